"""A run that was killed ends with the losses of an undisturbed one: through the real command."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from recycle import results
from recycle.results import Results
from tests.runs import STEP_TOKENS, command, environment, recycle, write_recipe

# Long enough for a signal to arrive in the middle of each part.
LONG: dict[str, Any] = {
    "training.tokens": 30 * STEP_TOKENS,
    "training.checkpoint_steps": 5,
    "training.validation_steps": 10,
    "evaluation.speed": True,
    "evaluation.prompt_tokens": 16,
    "evaluation.new_tokens": 96,
}


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", "tiny.yaml"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_at(process: subprocess.Popen[str], sign: Path, signal_number: int) -> tuple[str, str]:
    """Send a signal as soon as a file exists; what the process printed."""
    deadline = time.monotonic() + 120
    while not sign.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal_number)
    return process.communicate(timeout=60)


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
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"

    family = checkpoints / "nested"
    stop_at(start(tmp_path), family / "checkpoint-10" / "complete", signal.SIGKILL)
    assert not (family / "training.json").exists()

    control = checkpoints / "control"
    stop_at(start(tmp_path), control / "checkpoint-15" / "complete", signal.SIGKILL)
    assert (family / "training.json").exists()
    assert not (control / "training.json").exists()

    stop_at(start(tmp_path), control / "training.json", signal.SIGKILL)
    assert not (tmp_path / "runs" / "tiny" / "results.json").exists()
    trained = [json.loads((part / "training.json").read_text()) for part in (family, control)]

    done = recycle("run", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path)
    assert_same(found, undisturbed)
    # Only the comparison was done again.
    assert [training.model_dump(mode="json") for training in found.training] == trained
    left = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not [path.name for path in left if path.suffix in (".bin", ".pt", ".pth", ".tmp")]
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()


@pytest.mark.slow
def test_stopped_by_the_user(undisturbed: Results, tmp_path: Path, tiny_folder: Path) -> None:
    write_recipe(tmp_path, tiny_folder, **LONG)
    family = tmp_path / "runs" / "tiny" / "checkpoints" / "nested"
    process = start(tmp_path)
    _, error = stop_at(process, family / "checkpoint-5" / "complete", signal.SIGINT)
    assert process.returncode == 130
    assert error == "recycle: Stopped. The same command goes on from the last checkpoint.\n"
    assert not (family / "training.json").exists()

    # The newest checkpoint is torn as well, as if the machine had gone down.
    newest = max(family.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    weights = next(newest.rglob("optimizer.pt"))
    os.truncate(weights, weights.stat().st_size // 2)
    done = recycle("run", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(read(tmp_path), undisturbed)
