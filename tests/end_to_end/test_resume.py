"""A run that was killed ends with the losses of an undisturbed one: through the real command."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recycle import results
from recycle.results import Results
from tests.runs import STEP_TOKENS, environment, recycle, write_recipe

LONG: dict[str, Any] = {
    "training.tokens": 30 * STEP_TOKENS,
    "training.checkpoint_steps": 5,
    "training.validation_steps": 10,
}
# The command, which gets a signal just before it renames a file to the path that ends so, or
# removes the folder there.
STOPPED = """
import os, signal, sys
number, place = int(sys.argv.pop(1)), sys.argv.pop(1)
def watch(event, arguments):
    if event in ("os.rename", "shutil.rmtree"):
        path = arguments[1] if event == "os.rename" else arguments[0]
        if str(path).endswith(place):
            os.kill(os.getpid(), number)
sys.addaudithook(watch)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from recycle.cli import main
main()
"""


def stopped(folder: Path, number: int, place: str) -> subprocess.CompletedProcess[str]:
    """Run the recipe until it comes to `place`."""
    return subprocess.run(
        [sys.executable, "-c", STOPPED, str(int(number)), place, "run", "tiny.yaml"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def read(folder: Path) -> Results:
    return results.read(folder / "runs" / "tiny" / "results.json")


def assert_same(found: Results, expected: Results) -> None:
    """Every loss on the way and at the end, to 1e-6."""
    for training, other in zip(found.training, expected.training, strict=True):
        assert (training.name, training.steps) == (other.name, other.steps)
        for point, wanted in zip(training.train_loss, other.train_loss, strict=True):
            assert (point.step, point.tokens) == (wanted.step, wanted.tokens)
            assert point.loss == pytest.approx(wanted.loss, abs=1e-6)
        for at, there in zip(training.curve, other.curve, strict=True):
            assert (at.step, at.tokens) == (there.step, there.tokens)
            assert at.validation_loss == pytest.approx(there.validation_loss, abs=1e-6)
    for model, same in zip(found.models, expected.models, strict=True):
        assert model.name == same.name
        assert list(model.losses) == pytest.approx(list(same.losses), abs=1e-6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Results:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_recipe(folder, tiny_folder, **LONG)
    done = recycle("run", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return read(folder)


@pytest.mark.slow
def test_killed_in_every_part(undisturbed: Results, tmp_path: Path, tiny_folder: Path) -> None:
    write_recipe(tmp_path, tiny_folder, **LONG)
    run = tmp_path / "runs" / "tiny"
    nested, control = run / "checkpoints" / "nested", run / "checkpoints" / "control"

    def kill(place: str) -> None:
        done = stopped(tmp_path, signal.SIGKILL, place)
        assert done.returncode == -signal.SIGKILL, (place, done.stdout, done.stderr)

    kill("nested/checkpoint-10/complete")  # written, and not yet sealed
    left = sorted(path.name for path in nested.glob("checkpoint-*"))
    assert left == ["checkpoint-10", "checkpoint-5"]
    kill("nested/finished/training.json")
    assert (nested / "checkpoint-30" / "complete").is_file()
    kill("nested/checkpoint-30")  # removed where they are not needed any more
    assert (nested / "finished" / "complete").is_file()
    kill("control/checkpoint-15/complete")
    kill("control/finished/complete")
    assert not (run / "family.json").exists()
    trained = [json.loads(_record(nested)), None]
    kill("tiny/results.json")
    assert (run / "family.json").is_file()
    assert not (run / "results.json").exists()
    trained[1] = json.loads(_record(control))
    kill("tiny/report.md")  # after the results: nothing but them is needed for the rest
    assert (run / "results.json").is_file()
    kill("tiny/checkpoints")
    assert (run / "README.md").is_file()

    done = recycle("run", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout
    found = read(tmp_path)
    assert_same(found, undisturbed)
    # What was trained was not trained again.
    assert [training.model_dump(mode="json") for training in found.training] == trained
    left = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not [path.name for path in left if path.suffix in (".bin", ".pt", ".pth", ".tmp")]
    assert not (run / "checkpoints").exists()


def _record(adapter: Path) -> str:
    return (adapter / "finished" / "training.json").read_text()


@pytest.mark.slow
def test_stopped_by_the_user(undisturbed: Results, tmp_path: Path, tiny_folder: Path) -> None:
    write_recipe(tmp_path, tiny_folder, **LONG)
    family = tmp_path / "runs" / "tiny" / "checkpoints" / "nested"
    done = stopped(tmp_path, signal.SIGINT, "nested/checkpoint-10/complete")
    assert done.returncode == 130
    kept = "nested has a checkpoint at step 5. The same command goes on from there."
    assert done.stderr == f"recycle: Stopped; {kept}\n"
    assert not (family / "finished").exists()

    # The newest whole checkpoint is torn as well, as if the machine had gone down.
    shutil.rmtree(family / "checkpoint-10", ignore_errors=True)
    weights = next((family / "checkpoint-5").rglob("optimizer.pt"))
    os.truncate(weights, weights.stat().st_size // 2)
    (family / "checkpoint-10").mkdir()  # and a third, empty, as if it had just been begun
    done = stopped(tmp_path, signal.SIGKILL, "nested/checkpoint-5/complete")
    assert "going on" not in done.stdout  # none was whole
    done = stopped(tmp_path, signal.SIGKILL, "nested/checkpoint-20/complete")
    done = recycle("run", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    left, whole = 15 * STEP_TOKENS, 30 * STEP_TOKENS
    assert f"nested on {left:,} tokens of {whole:,}, going on from a checkpoint" in done.stdout
    assert_same(read(tmp_path), undisturbed)


@pytest.mark.slow
def test_killed_in_and_between_both_stages(tmp_path: Path, tiny_folder: Path) -> None:
    both = {
        "training.tokens": 20 * STEP_TOKENS,
        "training.checkpoint_steps": 4,
        "training.validation_steps": 4,
        "stages.adapt.train": "lora",
        "stages.adapt.learning_rate": 1e-2,
        "evaluation.compare": ["lora"],
    }
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write_recipe(tmp_path / name, tiny_folder, **both)
    done = recycle("run", "tiny.yaml", cwd=tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    run = tmp_path / "killed" / "runs" / "tiny"
    first = {}
    for place in (
        "compared/checkpoint-8/complete",
        "tiny/lora/complete",  # the adapter is written, and not yet sealed
        "checkpoints/adapted/checkpoint-12/complete",
        "checkpoints/adapted/finished/complete",
        "tiny/adapted/complete",
        "nested/finished/complete",
        "tiny/family.json",
        "tiny/results.json",
    ):
        done = stopped(tmp_path / "killed", signal.SIGKILL, place)
        assert done.returncode == -signal.SIGKILL, (place, done.stdout, done.stderr)
        sealed = (run / "adapted" / "complete").is_file()
        assert sealed == (
            place.startswith("nested") or place in ("tiny/family.json", "tiny/results.json")
        )
        for file in (run / "adapted").glob("training.json"):
            first.setdefault("adapted", json.loads(file.read_text()))
    done = recycle("run", run, cwd=tmp_path)  # the run's folder is enough to go on with it
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "killed")
    assert_same(found, read(tmp_path / "whole"))
    by_name = {training.name: training for training in found.training}
    assert by_name["adapted"].model_dump(mode="json") == first["adapted"]  # not trained again
