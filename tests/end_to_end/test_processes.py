"""One run in several processes: the numbers of one process, and what ends them."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recycle import results
from recycle.results import Results
from tests.runs import STEP_TOKENS, assert_refused, environment, recycle, write_recipe, write_texts

LONG: dict[str, Any] = {
    "stages.adapt.train": "lora",
    "training.tokens": 140 * STEP_TOKENS,
    "stages.streams.tokens": 100 * STEP_TOKENS,
    "training.checkpoint_steps": 4,
    "training.validation_steps": 20,
    "stages.streams.control": False,
    "stages.streams.control_learning_rate": None,
}
TWO = "launch.processes=2"
AGAIN = 75  # os.EX_TEMPFAIL


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with the recipe, and its run in one process in `one`."""
    folder = tmp_path_factory.mktemp("processes")
    write_texts(folder / "texts", 120)
    write_recipe(folder, tiny_folder, **LONG)
    done = recycle("run", "tiny.yaml", "output.dir=one", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def read(folder: Path) -> Results:
    return results.read(folder / "results.json")


def assert_same(found: Path, expected: Path) -> None:
    """Every loss of both runs to 1e-5: gradients add up in another order."""
    one, other = read(found), read(expected)
    for mine, theirs in zip(one.training, other.training, strict=True):
        assert mine.steps == theirs.steps
        assert mine.learned_tokens == theirs.learned_tokens
        for point, wanted in zip(mine.train_loss, theirs.train_loss, strict=True):
            assert point.loss == pytest.approx(wanted.loss, abs=1e-5)
        for point, wanted in zip(mine.curve, theirs.curve, strict=True):
            assert point.validation_loss == pytest.approx(wanted.validation_loss, abs=1e-5)
    for row, wanted in zip(one.models, other.models, strict=True):
        assert row.name == wanted.name
        assert row.losses == pytest.approx(wanted.losses, abs=1e-5)
        if row.streams and wanted.streams:
            assert row.streams.weights == pytest.approx(wanted.streams.weights, abs=1e-5)
            assert row.streams.entropy == pytest.approx(wanted.streams.entropy, abs=1e-5)
            correlation = wanted.streams.error_correlation
            assert row.streams.error_correlation == pytest.approx(correlation, abs=1e-4)
        assert (row.streams is None) == (wanted.streams is None) == (row.num_streams == 1)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "recycle", "run", "tiny.yaml", *arguments],
        cwd=folder,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(launcher: int) -> Iterator[int]:
    """The processes that a launcher started."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if parent == launcher:
            yield int(entry.name)


def wait_for(running: subprocess.Popen[str], *paths: Path) -> bool:
    """Whether one of the paths came to be while the command ran."""
    while running.poll() is None:
        if any(path.exists() for path in paths):
            return True
        time.sleep(0.02)
    pytest.fail(f"ended with {running.returncode}: {running.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_numbers_of_one(place: Path, parallel: str) -> None:
    settings = f"output.dir={parallel}", f"launch.parallel={parallel}", TWO
    done = recycle("run", "tiny.yaml", *settings, cwd=place)
    assert done.returncode == 0, done.stderr
    assert ("each with a part of it" in done.stdout) == (parallel == "fsdp")
    assert_same(place / parallel, place / "one")
    assert {x.processes for x in read(place / parallel).training} == {2}
    assert done.stdout.count("Recipe: ") == done.stdout.count("Report: ") == 1  # one of them talks
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        [
            *("backbone.quantization=nf4", "training.micro_batch_size=auto"),
            *("stages.adapt.train=none", "training.tokens=512"),
        ],
        ["stages.adapt.train=full", "stages.streams.train=all", "training.tokens=1024"],
    ],
    ids=["nf4", "all weights"],
)
def test_whatever_learns(place: Path, kind: list[str], tmp_path: Path) -> None:
    few = ["stages.streams.tokens=512", *kind]
    for processes in (1, 2):
        folder = f"output.dir={tmp_path / str(processes)}"
        done = recycle("run", "tiny.yaml", *few, folder, f"launch.processes={processes}", cwd=place)
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "2", tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then", "parallel"), [("2", "1", "ddp"), ("1", "2", "fsdp")])
def test_sigterm_leaves_a_checkpoint_for_any_number_of_processes(
    place: Path, first: str, then: str, parallel: str
) -> None:
    folder = place / f"from-{first}-{parallel}"
    settings = f"output.dir={folder}", "logging.steps=1", f"launch.parallel={parallel}"
    running = start(place, *settings, f"launch.processes={first}")
    assert wait_for(running, folder / "checkpoints/nested/checkpoint-4")
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=120)
    assert running.returncode == AGAIN, told
    assert told.count("nested has a checkpoint at step") == 1
    assert told.count("\n") == 1
    done = recycle("run", "tiny.yaml", *settings, f"launch.processes={then}", cwd=place)
    assert done.returncode == 0, done.stderr
    assert_same(folder, place / "one")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system tells the processes")
def test_processes_end_where_their_launcher_is_killed(place: Path) -> None:
    folder = place / "orphans"
    running = start(place, f"output.dir={folder}", TWO)
    assert wait_for(running, folder / "checkpoints/adapted/checkpoint-4")
    running.kill()
    running.communicate(timeout=60)  # until nobody holds its output any more
    assert not (folder / "checkpoints/adapted/finished").exists()
    assert not (folder / "results.json").exists()


@pytest.mark.slow
def test_ten_kills_change_nothing(place: Path) -> None:
    """At random moments, one process of two each time."""
    rng, folder = random.Random(0), place / "killed"
    for _ in range(10):
        running = start(place, f"output.dir={folder}", TWO)
        assert running.stdout is not None
        begun = rng.choice(["Backbone: ", "Expected: ", "Expected: "])  # before data, or training
        while not running.stdout.readline().startswith(begun):
            assert running.poll() is None
        time.sleep(rng.uniform(0, 1.5))
        os.kill(rng.choice(sorted(workers(running.pid))), signal.SIGKILL)
        _, told = running.communicate(timeout=120)
        assert running.returncode == 1, told
        assert "was ended by SIGKILL" in told
        assert told.count("recycle: ") == 1
        assert "Traceback" not in told
    done = recycle("run", "tiny.yaml", f"output.dir={folder}", TWO, cwd=place)
    assert done.returncode == 0, done.stderr
    assert_same(folder, place / "one")


def test_the_world_must_be_the_one_that_was_asked_for(place: Path) -> None:
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    done = subprocess.run(
        [*launched, "-m", "recycle", "run", "tiny.yaml", "output.dir=never"],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "recycle: A launcher asked for several processes" in done.stderr
    done = recycle("run", "tiny.yaml", "output.dir=never", "launch.processes=3", cwd=place)
    assert_refused(done, "batch_size=4", "launch.processes=1 or 2 or 4")
    assert not (place / "never").exists()


@pytest.mark.slow
def test_torchrun(place: Path) -> None:
    """With an error that all processes make, told once; and with the run of one process."""
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launched, "-m", "recycle", "run", "tiny.yaml", *arguments],
            cwd=place,
            env=environment(),
            capture_output=True,
            text=True,
        )

    done = torchrun("output.dir=never", "data.test_documents=1000")
    assert done.returncode != 0
    assert done.stderr.count("recycle: ") == 1
    assert not (place / "never").exists()
    done = torchrun("output.dir=torchrun")
    assert done.returncode == 0, done.stderr
    assert_same(place / "torchrun", place / "one")
