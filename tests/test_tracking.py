"""Tracking: what the trackers hold is what the records hold, once, in silence and offline."""

import importlib.util
import json
import sqlite3
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recycle.progress import Silent
from recycle.recipe import RecipeError, identity, resolve
from recycle.run.folder import Found, find_finished
from recycle.run.plan import plan_run
from recycle.train import TrainingPlan, last_checkpoint, train
from recycle.train.plan import Tracking
from tests.runs import ROOT, STEP_TOKENS, assert_refused, environment, write_recipe
from tests.test_train import Workshop

Scalars = Mapping[str, Mapping[int, float]]  # name -> step -> value

# `recycle` in a process that ends with 97 if it looks for another machine, and that leaves the
# names of the trackers it imported.
OFFLINE = """
import atexit, os, sys
HERE = ("127.0.0.1", "::1", "localhost")
def refuse(event, args):
    if event == "socket.getaddrinfo" and args[0] not in HERE:
        os._exit(97)
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in HERE:
        os._exit(97)
sys.addaudithook(refuse)
loaded = lambda: " ".join(sorted({"trackio", "tensorboard", "wandb"} & sys.modules.keys()))
atexit.register(lambda: open("loaded", "w").write(loaded()))
from recycle.cli import main
main()
"""


def run(place: Path, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}:{env.pop('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-c", OFFLINE, "run", "tiny.yaml", *map(str, arguments)],
        cwd=place,
        env=environment(PYTHONPATH=path, HOME=str(place), **env),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with a recipe and its finished run without a tracker."""
    place = tmp_path_factory.mktemp("tracking")
    write_recipe(place, tiny_folder, **{"training.gradient_checkpointing": "selective"})
    done = run(place, "output.dir=none")
    assert done.returncode == 0, done.stderr
    assert (place / "loaded").read_text() == ""
    assert not (place / "none/logs").exists()
    return place


def records(folder: Path) -> dict[str, Any]:
    """The trainings in a run's results, without what a clock said."""
    found = json.loads((folder / "results.json").read_text())["training"]
    return {
        record["name"]: {k: v for k, v in record.items() if "second" not in k} for record in found
    }


def in_tensorboard(logs: Path, training: str) -> Scalars:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs / training)).Reload()
    names = events.Tags()["scalars"]
    return {name: {x.step: x.value for x in events.Scalars(name)} for name in names}


def in_trackio(logs: Path, training: str) -> Scalars:
    database = sqlite3.connect(logs / "tiny.db")
    lines = database.execute("SELECT run_name, metrics FROM metrics").fetchall()
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in (json.loads(text) for name, text in lines if name.endswith(f"/{training}")):
        step = line.pop("train/global_step")
        for name, value in line.items():
            assert step not in found[name]
            found[name][step] = value
    return found


READERS = {"tensorboard": in_tensorboard, "trackio": in_trackio}


# ---- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("to", READERS)
def test_a_tracker_holds_what_the_records_hold(place: Path, to: str) -> None:
    done = run(place, f"output.dir={to}", f"logging.to={to}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "trackio" not in done.stdout.replace("output.dir=trackio", "").replace(
        "Report: trackio/", ""
    )
    trainings = records(place / to)
    assert trainings == records(place / "none")  # to the bit
    for name, record in trainings.items():
        found = READERS[to](place / to / "logs", name)
        losses = {x["step"]: x["loss"] for x in record["train_loss"]}
        assert found["train/loss"] == pytest.approx(losses, rel=1e-6)
        assert found["train/tokens"] == {step: step * STEP_TOKENS for step in range(1, 9)}
        curve = {x["step"]: x["validation_loss"] for x in record["curve"]}
        for row in curve[0]:
            means = {step: each[row] for step, each in curve.items()}
            assert found[f"eval/loss/{row.replace(' = ', '')}"] == pytest.approx(means, rel=1e-6)
        rates = found["train/learning_rate/prefix"]  # a step of warm-up, then down from the top
        assert (rates[1], rates[2]) == (0, pytest.approx(1e-2))
        assert list(rates.values())[1:] == sorted(list(rates.values())[1:], reverse=True)
        assert min(found["train/tokens_per_second"].values()) > 0
        assert not any("train_runtime" in x for x in found)
    assert {x for x in found if "weights" in x or "correlation" in x} == set()  # the control
    found = READERS[to](place / to / "logs", "nested")
    for step in range(1, 9):
        two, four = found["train/loss/P2"][step], found["train/loss/P4"][step]
        assert found["train/loss"][step] == pytest.approx((two + four) / 2, rel=1e-6)
        norms = [found[f"train/gradient_norm/{x}"][step] for x in ("prefix", "aggregator")]
        assert min(norms) > 0
        total = (norms[0] ** 2 + norms[1] ** 2) ** 0.5
        assert found["train/gradient_norm"][step] == pytest.approx(total, rel=1e-6)
    for p in (2, 4):
        weights = [found[f"eval/weights/P{p}/{i}"] for i in range(p)]
        assert [x[0] for x in weights] == [1 / p] * p  # an untrained aggregator
        assert sum(x[8] for x in weights) == pytest.approx(1, abs=1e-6)
        assert weights[0][8] != 1 / p
        assert set(found[f"eval/error_correlation/P{p}"]) == {0, 4, 8}
        assert all(0 < x < 1 for x in found[f"eval/error_correlation/P{p}"].values())


@pytest.mark.slow
def test_wandb_keeps_a_run_for_each_training(place: Path) -> None:
    wandb = pytest.importorskip("wandb")
    beside = str(Path(wandb.__file__).parents[1])
    arguments = ("output.dir=wandb-run", "logging.to=wandb")
    online = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_ERROR_REPORTING": "false"}
    refused = run(place, *arguments, PYTHONPATH=beside, **online)
    assert_refused(refused, "No API key", "WANDB_MODE=offline")
    done = run(place, *arguments, PYTHONPATH=beside, WANDB_MODE="offline")
    assert (done.returncode, done.stderr) == (0, "")
    assert "wandb" not in done.stdout.replace("wandb-run", "").replace("logging.to=wandb", "")
    assert records(place / "wandb-run") == records(place / "none")
    logs = place / "wandb-run/logs"
    for name in ("nested", "control"):
        own = (logs / f"{name}.wandb").read_text()
        (kept,) = logs.glob(f"wandb/offline-run-*-{own}/run-{own}.wandb")
        assert (b"train/loss/P4" in kept.read_bytes()) == (name == "nested")
        assert b"train/gradient_norm/prefix" in kept.read_bytes()


# ---- going on


class Killed(Silent):
    """Ends a training after so many steps of this process."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, done: int, loss: float | None = None) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("to", READERS)
def test_a_run_that_goes_on_tracks_no_step_twice(
    tmp_path: Path, tiny_folder: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "logs"))
    changes = {"logging.to": to, "stages.streams.control": False, "training.checkpoint_steps": 3}
    recipe = resolve(str(write_recipe(tmp_path, tiny_folder, **changes))).recipe
    tiny = Workshop(recipe)
    (settled,) = plan_run(Found(recipe, tmp_path, None)).trainings
    assert settled.tracking == Tracking(to, "tiny", tmp_path / "logs", "nested")
    tiny.add(settled)
    splits = tiny.splits
    arguments = (tiny.model, settled, splits.train[0], splits.validation[0], 4)
    for steps, kept in ((2, None), (5, "checkpoint-3")):  # the first leaves no checkpoint
        with pytest.raises(KeyboardInterrupt):
            train(*arguments, Killed(steps))
        assert (x := last_checkpoint(settled.folder)) is None or x.name == kept
    record = train(*arguments, Silent())
    found = READERS[to](tmp_path / "logs", "nested")
    losses = {point.step: point.loss for point in record.train_loss}
    assert list(losses) == list(range(1, 9))
    assert list(found["train/tokens"]) == list(range(1, 9))
    assert list(found["eval/loss/P4"]) == [0, 4, 8]
    after = {step: x for step, x in found["train/loss"].items() if step > 2}
    assert after == pytest.approx({step: losses[step] for step in range(3, 9)}, rel=1e-6)


# ---- recipes


def test_a_tracker_decides_nothing(place: Path) -> None:
    plain, tracked = (
        resolve(str(place / "tiny.yaml"), [f"logging.to={to}"]).recipe
        for to in ("none", "tensorboard")
    )
    assert identity(plain) == identity(tracked)
    plans: list[tuple[TrainingPlan, ...]] = [
        plan_run(Found(x, place, None)).trainings for x in (plain, tracked)
    ]
    assert [x.tracking for x in plans[0]] == [None, None]
    assert [x.tracking.run for x in plans[1] if x.tracking] == [
        f"{place.name}/nested",
        f"{place.name}/control",
    ]
    assert plans[0] == tuple(replace(x, tracking=None) for x in plans[1])


def test_a_tracker_that_is_not_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("trackio", "wandb") else found(name, *rest),
    )
    recipe = str(place / "tiny.yaml")
    for to, package in (("trackio", "'recycle-lm[trackio]'"), ("wandb", "wandb")):
        (told,) = resolve(recipe, [f"logging.to={to}"]).missing
        assert told.endswith(f"logging.to = {to}: this needs {to}: pip install {package}")
    assert resolve(recipe, ["logging.to=tensorboard"]).missing == ()
    with pytest.raises(RecipeError, match=r"none.*did you mean tensorboard\?"):
        resolve(recipe, ["logging.to=tensorbord"])
    saved = place / "none/recipe.yaml"
    before = saved.read_text()
    saved.write_text(before.replace("to: none", "to: trackio"))
    assert find_finished(str(place / "none"), [], None).results  # nothing is trained there
    saved.write_text(before)
