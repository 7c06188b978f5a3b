"""The micro-batch that fits, under limits of memory that are counted and not this machine's."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recycle import world
from recycle.cost import capacity as capacity_module
from recycle.evaluate import OutputHead
from recycle.progress import Silent
from recycle.recipe import resolve
from recycle.run.folder import Found
from recycle.run.plan import plan_run
from recycle.train import TrainingError, TrainingPlan, add_streams, fitting
from recycle.train.fitting import FITTED, Trial, fit
from tests.runs import command_here, write_recipe
from tests.tiny import tiny_model

GIB = 2**30
BASE, STREAM = 1000.0, 100.0  # of a machine on which memory is counted by streams and tokens


class News(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def plan(tmp_path: Path, tiny_folder: Path) -> TrainingPlan:
    changes = {"training.micro_batch_size": "auto", "training.batch_size": 12}
    recipe = resolve(str(write_recipe(tmp_path, tiny_folder, **changes))).recipe
    return plan_run(Found(recipe, tmp_path / "run", None)).trainings[0]


@pytest.fixture
def model(plan: TrainingPlan, tmp_path: Path, tiny_folder: Path) -> Any:
    method = resolve(str(write_recipe(tmp_path, tiny_folder))).recipe.method
    starts = torch.arange(16).view(4, 4)
    return add_streams(tiny_model(), plan, method, starts, None)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Rows, tokens and streams at once of every pass, none of which is run."""
    tried: list[tuple[int, int, int]] = []

    def peak(self: Trial, rows: int, tokens: int, at_once: int) -> float:
        tried.append((rows, tokens, at_once))
        found = BASE + STREAM * rows * at_once * tokens / self.plan.block_size
        return found if found <= self.capacity else math.inf

    monkeypatch.setattr(Trial, "peak", peak)
    monkeypatch.setattr(fitting, "held", lambda device: BASE)
    monkeypatch.setattr(fitting, "MOMENTS", 0)
    monkeypatch.setattr(fitting, "BUCKETS", 0)
    return tried


@pytest.mark.parametrize(
    ("rows", "processes", "size"),
    [(12, 1, 12), (11.9, 1, 6), (5, 1, 4), (3, 1, 3), (1.5, 1, 1), (12, 2, 6), (12, 12, 1)],
)
def test_the_largest_divisor_that_fits(
    plan: TrainingPlan,
    model: Any,
    passes: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    rows: float,
    processes: int,
    size: int,
) -> None:
    room = (BASE + STREAM * 4 * rows) / 0.9 + 1e-6  # rows of four streams
    monkeypatch.setattr(fitting, "capacity", lambda device: room)
    news = News()
    monkeypatch.setattr(world, "size", lambda: processes)
    found = fit(model, plan, False, news)
    assert (found.micro_batch_size, found.at_once) == (size, None)
    assert news.lines == [f"nested: micro-batches of {size} of 12 blocks fit into memory"]
    assert all(each <= max(size, 2) for each, _, _ in passes)
    assert found.settings.batch_size == plan.settings.batch_size == 12
    again = fit(model, plan, False, news)
    assert again == found
    assert len(news.lines) == 1  # from what was written down
    assert fit(model, found, False, news) is found


def test_processes_take_what_all_can(
    plan: TrainingPlan, model: Any, passes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one has less room, and holds more in each pass."""
    room = (BASE + STREAM * 8) / 0.9 + 1e-6  # two rows of four streams
    monkeypatch.setattr(fitting, "capacity", lambda device: 2 * room)
    monkeypatch.setattr(world, "gather", lambda mine: [mine, mine if mine != 2 * room else room])
    found = fit(model, plan, False, Silent())
    assert (found.micro_batch_size, found.at_once) == (2, None)


@pytest.mark.parametrize(("streams", "at_once"), [(3.9, 2), (2, 2), (1.5, 1)])
def test_streams_in_groups_where_one_row_does_not_fit(
    plan: TrainingPlan,
    model: Any,
    passes: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    streams: float,
    at_once: int,
) -> None:
    room = (BASE + STREAM * streams) / 0.9 + 1e-6
    monkeypatch.setattr(fitting, "capacity", lambda device: room)
    news = News()
    found = fit(model, plan, False, news)
    assert (found.micro_batch_size, found.at_once) == (1, at_once)
    assert news.lines[0].endswith(f"fit into memory, {at_once} of 4 streams at once")


def test_nothing_fits(
    plan: TrainingPlan, model: Any, passes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "capacity", lambda device: BASE)
    with pytest.raises(
        TrainingError, match=r"'nested' does not fit into memory: a block of 32"
    ) as e:
        fit(model, plan, False, Silent())
    assert "training.gradient_checkpointing=true (now false) and data.block_size=16" in str(e.value)
    assert not (plan.folder / FITTED).exists()


def test_long_rows_are_approached(
    plan: TrainingPlan, model: Any, passes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole row is not tried where a part of it tells that it would not fit."""
    monkeypatch.setattr(fitting, "capacity", lambda device: (BASE + STREAM) / 0.9)
    long = replace(plan, block_size=1024)
    assert fit(model, long, False, Silent()).at_once == 1
    lengths = {k: [tokens for _, tokens, at_once in passes if at_once == k] for k in (4, 2, 1)}
    assert lengths == {4: [128, 256], 2: [128, 256, 512], 1: [128, 256, 512, 1024]}


@pytest.mark.parametrize("packed", [False, True])
def test_a_real_pass(plan: TrainingPlan, model: Any, packed: bool) -> None:
    """Memory that a pass takes is seen, and the model is as it was."""
    state = torch.random.get_rng_state()
    long = replace(plan, block_size=512, own_loss=0.5)
    with Trial(model, long, packed) as trial:
        trial.peak(1, 512, 4)  # code and the allocator's own
        small, large = trial.peak(1, 512, 4), trial.peak(8, 512, 4)
        assert any(p.grad is not None for p in model.parameters())
    hidden = 4 * 512 * 64 * 4  # bytes of the streams' hidden states of a row
    assert large - small > 7 * 10 * hidden
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.is_gradient_checkpointing


def test_a_pass_without_memory(
    plan: TrainingPlan, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_probs(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(OutputHead, "log_probs", lambda *a, **k: log_probs())
    with Trial(model, plan, False) as trial:
        assert trial.peak(1, 32, 4) == math.inf


def test_a_part_of_a_model_without_memory(
    plan: TrainingPlan, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are in the middle of a layer: nothing smaller is tried, and it is said what to."""
    monkeypatch.setattr(fitting, "is_sharded", lambda model: True)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def log_probs(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(OutputHead, "log_probs", log_probs)
    with pytest.raises(TrainingError, match=r"^Out of memory in fitting 'nested'") as e:
        fit(model, plan, False, Silent())
    assert "Set training.gradient_checkpointing=true (now false) and stages" in str(e.value)


def test_the_moments_of_adamw_are_to_come(plan: TrainingPlan, model: Any) -> None:
    trial = Trial(model, plan, False)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trial.limit == pytest.approx(0.9 * trial.capacity - 8 * learned)
    assert trial.before < trial.capacity


def test_a_container_has_less_than_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(capacity_module, "CGROUPS", ((str(limit), str(used)),))
    cpu = torch.device("cpu")
    whole = capacity_module.capacity(cpu)
    limit.write_text("max\n")
    used.write_text(f"{GIB}\n")
    assert capacity_module.capacity(cpu) == pytest.approx(whole, rel=0.2)
    limit.write_text(f"{GIB + 1000}\n")
    assert capacity_module.capacity(cpu) - capacity_module.held(cpu) == pytest.approx(
        1000, abs=100 * 2**20
    )
    assert capacity_module.capacity(cpu) < whole


def test_a_run_with_auto_is_that_with_a_number(
    tmp_path: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = command_here(capsys, monkeypatch)
    changes = {"stages.streams.micro_batch_size": "auto", "stages.streams.control": False}
    recipe = write_recipe(tmp_path, tiny_folder, **changes)
    done = run("run", recipe)
    assert done.returncode == 0, done.stderr
    assert "nested: micro-batches of 4 of 4 blocks fit into memory" in done.stdout
    table = done.stdout[done.stdout.index("held-out") :].replace("tiny-2", "tiny")
    number = run("run", recipe, "stages.streams.micro_batch_size=1", "--new")
    assert number.returncode == 0, number.stderr
    rows = [line for line in table.splitlines() if "P = " in line]
    assert len(rows) == 2
    assert all(line in number.stdout for line in rows)
