"""Training: what learns, how fast, from how much, and when it stops."""

import hashlib
import importlib
import math
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recycle import backbone as backbones
from recycle import data
from recycle.cost import PassCost
from recycle.data import IGNORED, Splits
from recycle.evaluate import OutputHead, Pass, document_losses, passes_of
from recycle.parscale import ActiveStreams, choose_streams
from recycle.parscale import prefix as prefix_module
from recycle.progress import Silent
from recycle.recipe import Data, Recipe, resolve
from recycle.results import TrainingRecord
from recycle.run.folder import Found
from recycle.run.plan import plan_run
from recycle.train import (
    StreamTrainer,
    TrainingError,
    TrainingPlan,
    add_streams,
    last_checkpoint,
    train,
)
from recycle.train.validation import Validation
from tests.runs import STEP_TOKENS, write_recipe

passes_room = importlib.import_module("recycle.cost.passes")

RATES = {"nested": 1e-2, "aggregator": 1e-3, "control": 3e-2}


class Workshop:
    """A backbone, blocks and adapters for one recipe, and the trainings of its plan."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model: Any
        self.model, self.tokenizer, _ = backbones.load_backbone(recipe.backbone, "cpu")
        self.splits: Splits = data.prepare(
            [data.StageData(recipe.data, self.plans()[0].steps * recipe.training.batch_size)],
            self.tokenizer,
            num_virtual_tokens=recipe.method.num_virtual_tokens,
            num_starts=max(recipe.streams),
        )

    def plans(self, folder: Path = Path("unused")) -> tuple[TrainingPlan, ...]:
        """The trainings of the recipe, with their checkpoints in this folder."""
        trainings = plan_run(Found(self.recipe, folder, None)).trainings
        return tuple(replace(plan, folder=folder / plan.adapter) for plan in trainings)

    def add(self, plan: TrainingPlan) -> None:
        starts, quantization = self.splits.starts, self.recipe.backbone.quantization
        self.model = add_streams(self.model, plan, self.recipe.method, starts, quantization)

    def train(self, plan: TrainingPlan) -> TrainingRecord:
        splits, size = self.splits, self.recipe.evaluation.batch_size
        return train(self.model, plan, splits.train[0], splits.validation[0], size, Silent())

    def trainer(self, plan: TrainingPlan, head: OutputHead) -> StreamTrainer:
        splits, size = self.splits, self.recipe.evaluation.batch_size
        validation = Validation(plan, splits.validation[0], size)
        return StreamTrainer(self.model, plan, splits.train[0], validation, head, Silent())

    def train_all(self, folder: Path) -> list[TrainingRecord]:
        trainings = []
        for plan in self.plans(folder):
            self.add(plan)
            trainings.append(self.train(plan))
        return trainings

    def adapter(self, name: str) -> dict[str, nn.Parameter]:
        return {
            key: parameter
            for key, parameter in self.model.named_parameters()
            if "parscale_" in key and name in key.split(".")
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture
def workshop(place: Path, tiny_folder: Path) -> Any:
    def make(**changes: Any) -> Workshop:
        return Workshop(resolve(str(write_recipe(place, tiny_folder, **changes))).recipe)

    return make


def losses(training: TrainingRecord) -> list[float]:
    return [point.loss for point in training.train_loss]


def hashes(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor of the backbone, by its name there."""
    return {
        name.removeprefix("base_model.model."): hashlib.sha256(
            tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if "parscale_" not in name
    }


class Recording(torch.optim.AdamW):
    """AdamW that writes down the learning rates and the gradients' norm of every step."""

    rates: list[list[float]]
    norms: list[float]

    def step(self, closure: Any = None) -> Any:
        type(self).rates.append([group["lr"] for group in self.param_groups])
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        type(self).norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients)))
        return super().step(closure)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    Recording.rates, Recording.norms = [], []
    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    return Recording


# ---- what it will take


def test_what_passes_cost(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From passes of so many seconds and a growth of 1 GiB."""
    tiny = workshop(**{"data.block_size": 64, "training.tokens": 8 * 4 * 64})
    family = tiny.plans()[0]
    tiny.add(family)

    def cost(active: ActiveStreams | None, *seconds: float) -> Any:
        # One pass to warm up, then learning and reading.
        clock = iter([0, 100, *(x for each in seconds for x in (0, each))])
        memory = iter([2 * 2**30, 3 * 2**30])
        monkeypatch.setattr(passes_room.time, "perf_counter", lambda: next(clock))
        monkeypatch.setattr(passes_room, "peak_memory", lambda device: next(memory))
        with OutputHead(tiny.model) as head:
            return passes_room.pass_cost(
                tiny.model,
                head.log_probs,
                active,
                block_size=64,
                micro_batch_size=2,
                gradient_checkpointing=False,
            )

    found = cost(family.active, 8, 4)
    adapter = sum(p.numel() for p in tiny.adapter("nested").values())
    assert (found.learning, found.reading) == (8 / 64, 4 / 64)
    # Two blocks in a micro-batch; a gradient and two moments in float32.
    assert found.gib == pytest.approx(2 + 2 + 12 * adapter / 2**30)
    assert not any(p.grad is not None for p in tiny.model.parameters())
    alone = PassCost(learning=2 / 64, reading=1 / 64, gib=1.0)
    assert found.between(alone, 1) == found
    control = found.between(alone, 0)  # costs what the backbone does
    assert (control.learning, control.reading) == (pytest.approx(2 / 64), 1 / 64)


def test_what_passes_cost_where_memory_is_small(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter ones tell it, but no process has shorter ones alone that has a part of a model."""
    model, tried = workshop().model, list[int]()

    def log_probs(active: ActiveStreams | None, ids: Tensor, labels: Tensor) -> Tensor:
        tried.append(ids.shape[1])
        if ids.shape[1] > 80:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return ids.float()

    settings = {"block_size": 512, "micro_batch_size": 1, "gradient_checkpointing": False}
    passes_room.pass_cost(model, log_probs, None, **settings)
    assert tried == [32, 128, 64, 64]
    monkeypatch.setattr(passes_room, "is_sharded", lambda model: True)
    with pytest.raises(torch.OutOfMemoryError):
        passes_room.pass_cost(model, log_probs, None, **settings)
    assert tried[4:] == [32, 128]


def test_activations_are_computed_again_as_asked(workshop: Any, tmp_path: Path) -> None:
    """None of them, the cheap ones, all: told by the operations of a token."""
    counted = []
    for level in (False, "selective", True):
        settings = {"training.gradient_checkpointing": level, "stages.streams.control": False}
        (record,) = workshop(**settings).train_all(tmp_path / str(level))
        counted.append(record.flops_per_token)
    none, cheap, everything = counted
    # Of a pass of two parts, forward and input gradients, one is done twice.
    assert none <= cheap < 1.05 * none
    assert 1.3 * none < everything < 1.5 * none


def test_validations_that_are_left(workshop: Any) -> None:
    tiny = workshop(**{"training.validation_steps": 3})  # 8 steps: 0, 3, 6 and 8
    plan = tiny.plans()[0]
    assert [plan.validations(done) for done in range(9)] == [4, 3, 3, 2, 2, 2, 1, 1, 0]
    even = workshop(**{"training.validation_steps": 4}).plans()[0]  # 0, 4 and 8
    assert [even.validations(done) for done in (0, 3, 4, 8)] == [3, 2, 1, 0]


# ---- what learns


def test_prefixes_and_aggregators_learn_and_no_bit_of_the_backbone(
    workshop: Any, tmp_path: Path
) -> None:
    tiny = workshop(**{"backbone.dtype": "bfloat16", "training.warmup": 0})
    before = hashes(tiny.model)
    assert len(before) > 20
    for job in tiny.plans(tmp_path):
        tiny.add(job)
        start = {name: p.detach().clone() for name, p in tiny.adapter(job.adapter).items()}
        tiny.train(job)
        for name, parameter in tiny.adapter(job.adapter).items():
            assert parameter.dtype == torch.float32
            assert not torch.equal(parameter, start[name]), name
    assert hashes(tiny.model) == before
    names = {name.rpartition("parscale_")[2] for name in tiny.adapter("nested")}
    assert {"keys.nested", "values.nested"} <= names
    assert any("p2_" in name for name in names)
    assert any("p4_" in name for name in names)


def test_the_control_leaves_the_family_as_it_was(workshop: Any, tmp_path: Path) -> None:
    tiny = workshop()
    family, control = tiny.plans(tmp_path)
    tiny.add(family)
    tiny.train(family)
    trained = {name: p.detach().clone() for name, p in tiny.adapter("nested").items()}
    tiny.add(control)
    tiny.train(control)
    for name, parameter in tiny.adapter("nested").items():
        assert torch.equal(parameter, trained[name]), name


def test_a_head_of_weight_zero_learns_nothing(workshop: Any, tmp_path: Path) -> None:
    tiny = workshop(**{"stages.streams.loss_weights": {"2": 0}, "stages.streams.control": False})
    (job,) = tiny.plans(tmp_path)
    tiny.add(job)
    start = {name: p.detach().clone() for name, p in tiny.adapter("nested").items()}
    tiny.train(job)
    moved = {n for n, p in tiny.adapter("nested").items() if not torch.equal(p, start[n])}
    assert not [name for name in moved if "p2_" in name]
    assert {name for name in start if "p4_" in name} <= moved


# ---- the loss


@pytest.mark.parametrize("weights", [{}, {"2": 3.0}, {"2": 0.5, "4": 0}])
def test_the_loss_is_the_weighted_mean_of_every_head_on_its_own(
    workshop: Any, tmp_path: Path, weights: dict[str, float]
) -> None:
    tiny = workshop(**{"stages.streams.loss_weights": weights})
    job = tiny.plans(tmp_path)[0]
    tiny.add(job)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # a fresh aggregator weighs all streams alike
        for parameter in tiny.adapter("nested").values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    tokens = torch.tensor(tiny.splits.train[0][:3]["input_ids"])
    with OutputHead(tiny.model) as head:
        trainer = tiny.trainer(job, head)
        inputs = {"input_ids": tokens, "labels": tokens}
        count = tokens[:, 1:].numel()
        found = trainer.compute_loss(tiny.model, inputs, num_items_in_batch=count).item()

    single: dict[int, Tensor] = {}
    for p in (2, 4):
        with choose_streams(tiny.model, ActiveStreams("nested", p, (p,))):
            logits = tiny.model(input_ids=tokens, use_cache=False).logits
        single[p] = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    shares = {p: weights.get(str(p), 1.0) for p in (2, 4)}
    expected = sum(shares[p] * single[p].item() for p in single) / sum(shares.values())
    assert abs(single[2] - single[4]) > 0.01
    assert found == pytest.approx(expected, abs=1e-5)  # sums in another order


@pytest.mark.parametrize("packs", [True, False])
def test_conversations_are_learned_as_each_is_on_its_own(
    workshop: Any, tmp_path: Path, packs: bool
) -> None:
    tiny = workshop(**{"training.tokens": STEP_TOKENS, "stages.streams.control": False})
    job = tiny.plans(tmp_path)[0]
    chat = Data(source="tasks", block_size=200, validation_documents=2, test_documents=2)
    tiny.splits = data.prepare(
        [data.StageData(chat, 4)], tiny.tokenizer, num_virtual_tokens=4, num_starts=4, packs=packs
    )
    tiny.add(job)
    expected, count = 0.0, 0
    with OutputHead(tiny.model) as head, torch.no_grad():
        for row in tiny.splits.train[0]:
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            positions = torch.tensor(row["position_ids"]) if packs else torch.arange(len(ids))
            begins = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for begin, end in pairwise(begins):
                part = slice(begin, end)
                active = ActiveStreams("nested", 4, (2, 4))
                found = head.log_probs(active, ids[None, part], labels[None, part])
                expected -= found.sum().item() / 2
                count += int((labels[part] != IGNORED).sum())
        assert count == tiny.splits.facts[0]["chat"]["learned_tokens"]
    record = tiny.train(job)
    assert losses(record) == [pytest.approx(expected / count, abs=1e-5)]
    assert len(record.curve) == 2


def test_micro_batches_change_no_loss(workshop: Any, tmp_path: Path) -> None:
    found = []
    for size in (1, 4):
        tiny = workshop(**{"training.micro_batch_size": size, "stages.streams.control": False})
        found += tiny.train_all(tmp_path / str(size))
    assert losses(found[0]) == pytest.approx(losses(found[1]), abs=1e-5)
    assert len(set(losses(found[0]))) == 8


def test_gradient_checkpointing_changes_no_loss(workshop: Any, tmp_path: Path) -> None:
    found = []
    for on in (True, "selective", False):
        tiny = workshop(**{"training.gradient_checkpointing": on, "stages.streams.control": False})
        found += tiny.train_all(tmp_path / str(on))
    for record in found[:2]:
        assert losses(record) == pytest.approx(losses(found[2]), abs=1e-6)


# ---- how fast


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_learning_rates(
    workshop: Any, tmp_path: Path, recording: type[Recording], decay: str
) -> None:
    tiny = workshop(
        **{
            "training.warmup": 0.25,
            "training.decay": decay,
            "stages.streams.prefix_learning_rate": RATES["nested"],
            "stages.streams.aggregator_learning_rate": RATES["aggregator"],
            "stages.streams.control_learning_rate": RATES["control"],
        }
    )
    tiny.train_all(tmp_path)
    total, warmup = 8, 2
    falls = {
        "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
        "linear": lambda x: 1 - x,
        "constant": lambda x: 1.0,
    }
    factors = [
        step / warmup if step < warmup else falls[decay]((step - warmup) / (total - warmup))
        for step in range(total)
    ]
    family, control = recording.rates[:total], recording.rates[total:]
    assert [prefix for prefix, _ in family] == pytest.approx([RATES["nested"] * f for f in factors])
    aggregators = [RATES["aggregator"] * f for f in factors]
    assert [aggregator for _, aggregator in family] == pytest.approx(aggregators)
    assert [rates[0] for rates in control] == pytest.approx([RATES["control"] * f for f in factors])


def test_the_groups_of_the_optimizer_hold_what_they_say(workshop: Any, tmp_path: Path) -> None:
    tiny = workshop()
    job = tiny.plans(tmp_path)[0]
    tiny.add(job)
    with OutputHead(tiny.model) as head:
        trainer = tiny.trainer(job, head)
    names = {id(parameter): name for name, parameter in tiny.model.named_parameters()}
    prefixes, aggregators = (
        [names[id(parameter)] for parameter in group["params"]]
        for group in trainer.optimizer.param_groups
    )
    assert len(prefixes) == 2 * 2  # keys and values in each of two layers
    assert all("parscale_keys" in name or "parscale_values" in name for name in prefixes)
    assert len(aggregators) == 2 * 4  # two linear layers for each of two p_values
    assert all("parscale_aggregator" in name for name in aggregators)


def test_gradients_are_clipped(workshop: Any, tmp_path: Path, recording: type[Recording]) -> None:
    unclipped = workshop(**{"training.max_grad_norm": 1e6, "stages.streams.control": False})
    unclipped.train_all(tmp_path / "unclipped")
    assert min(recording.norms) > 0.02
    recording.norms.clear()
    clipped = workshop(**{"training.max_grad_norm": 0.01, "stages.streams.control": False})
    clipped.train_all(tmp_path / "clipped")
    assert recording.norms == pytest.approx([0.01] * 8, rel=1e-3)


# ---- from how much


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0), (1, 1), (STEP_TOKENS, 1), (5 * STEP_TOKENS - 1, 4), (5 * STEP_TOKENS, 5)],
)
def test_the_budget_is_met_to_within_one_step(
    workshop: Any, tmp_path: Path, tokens: int, expected: int
) -> None:
    tiny = workshop(**{"training.tokens": tokens, "training.validation_steps": 2})
    for training in tiny.train_all(tmp_path):
        assert (training.steps, training.tokens) == (expected, expected * STEP_TOKENS)
        assert abs(training.tokens - tokens) < STEP_TOKENS
        assert [point.step for point in training.train_loss] == list(range(1, expected + 1))
        assert [point.tokens for point in training.train_loss] == [
            STEP_TOKENS * step for step in range(1, expected + 1)
        ]
        if expected == 0:
            assert (training.tokens_per_second, training.curve) == (None, ())
        elif tokens == 1:  # a warm-up's first step has a rate of zero, and may not be the only one
            assert training.curve[-1].validation_loss != training.curve[0].validation_loss
    assert len(tiny.splits.train[0]) == 4 * expected


def test_every_block_is_read_once(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []
    compute = StreamTrainer.compute_loss

    def watch(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Tensor:
        read.extend(map(tuple, inputs["input_ids"].tolist()))
        return compute(self, model, inputs, *rest, **more)

    monkeypatch.setattr(StreamTrainer, "compute_loss", watch)
    tiny = workshop(**{"stages.streams.control": False})
    tiny.train_all(tmp_path)
    counted, *read = read  # operations are counted on a row, from which nothing is learned
    assert counted == tuple(tiny.splits.train[0][0]["input_ids"])
    assert sorted(read) == sorted(map(tuple, tiny.splits.train[0]["input_ids"]))


def test_the_validation_curve(workshop: Any, tmp_path: Path) -> None:
    tiny = workshop()
    family, control = tiny.train_all(tmp_path)
    for training, names in ((family, ["P = 2", "P = 4"]), (control, ["control"])):
        assert [point.step for point in training.curve] == [0, 4, 8]
        assert [point.tokens for point in training.curve] == [0, 4 * STEP_TOKENS, 8 * STEP_TOKENS]
        assert all(list(point.validation_loss) == names for point in training.curve)
    tiny.model.eval()
    with OutputHead(tiny.model) as head:
        found = document_losses(head, passes_of(tiny.model), tiny.splits.validation[0], 2)
    for name, loss in {
        **family.curve[-1].validation_loss,
        **control.curve[-1].validation_loss,
    }.items():
        assert loss == pytest.approx(sum(found[name]) / 3, abs=1e-5)  # batches of other sizes
    # The tiny model is random, but its training text is made like its validation text.
    for name in ("P = 2", "P = 4"):
        assert family.curve[-1].validation_loss[name] < family.curve[0].validation_loss[name]


def test_logging_steps_thin_the_log_and_nothing_else(workshop: Any, tmp_path: Path) -> None:
    every, third = (
        workshop(**{"logging.steps": n, "stages.streams.control": False}).train_all(
            tmp_path / str(n)
        )[0]
        for n in (1, 3)
    )
    assert [point.step for point in third.train_loss] == [3, 6, 8]
    assert losses(third) == [losses(every)[step] for step in (2, 5, 7)]
    assert third.curve == every.curve


# ---- families


def test_an_independent_family(workshop: Any, tmp_path: Path) -> None:
    tiny = workshop(**{"stages.streams.nested": False})
    trainings = tiny.train_all(tmp_path)
    assert [(training.name, training.p_values) for training in trainings] == [
        ("p4", (4,)),
        ("p2", (2,)),
        ("control", (1,)),
    ]
    assert len({losses(training)[-1] for training in trainings}) == 3


def test_random_starts_are_the_same_for_the_same_seed(workshop: Any) -> None:
    starts = []
    for seed in (0, 0, 1):
        tiny = workshop(**{"method.init": "random", "training.seed": seed})
        tiny.add(tiny.plans()[0])
        starts.append(torch.cat([p.flatten() for p in tiny.adapter("nested").values()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


# ---- when it stops


class Poisoned(torch.optim.AdamW):
    """AdamW that makes a parameter of the first group NaN in its fifth step."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        type(self).count += 1
        if type(self).count == 5:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)
        return found


def test_a_loss_that_is_not_finite_stops_and_can_be_resumed(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = workshop(**{"stages.streams.control": False})
    (expected,) = undisturbed.train_all(tmp_path / "undisturbed")

    Poisoned.count = 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Poisoned)
        with pytest.raises(TrainingError, match=r"loss .* is not finite at step 6") as caught:
            workshop(**{"stages.streams.control": False}).train_all(tmp_path / "poisoned")
    assert "last good checkpoint is kept" in str(caught.value)
    checkpoint = last_checkpoint(tmp_path / "poisoned" / "nested")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"

    mended = workshop(**{"stages.streams.control": False})
    (found,) = mended.train_all(tmp_path / "poisoned")
    assert losses(found) == pytest.approx(losses(expected), abs=1e-6)
    assert found.curve == expected.curve
    for name, parameter in undisturbed.adapter("nested").items():
        assert torch.allclose(mended.adapter("nested")[name], parameter, atol=1e-6), name


def test_a_start_that_is_not_finite(workshop: Any, tmp_path: Path) -> None:
    tiny = workshop()
    job = tiny.plans(tmp_path)[0]
    tiny.add(job)
    with torch.no_grad():
        next(iter(tiny.adapter("nested").values())).fill_(math.inf)
    with pytest.raises(TrainingError, match="validation loss is not finite at step 0"):
        tiny.train(job)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_frozen_prefix(workshop: Any, tmp_path: Path) -> None:
    tiny = workshop()
    job = tiny.plans(tmp_path)[0]
    tiny.add(job)
    name, parameter = next(iter(tiny.adapter("nested").items()))
    parameter.requires_grad_(False)
    with pytest.raises(TrainingError) as caught:
        tiny.train(job)
    assert f"gradient of {name} is missing at step 1" in str(caught.value)


def test_a_detached_prefix(workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepend = prefix_module._prepend
    monkeypatch.setattr(
        prefix_module, "_prepend", lambda prefix, states: prepend(prefix.detach(), states)
    )
    with pytest.raises(TrainingError, match=r"parscale_\w+\.nested is missing at step 1"):
        workshop().train_all(tmp_path)


def test_a_gradient_that_is_not_finite(workshop: Any, tmp_path: Path) -> None:
    tiny = workshop()
    job = tiny.plans(tmp_path)[0]
    tiny.add(job)
    name, parameter = next(iter(tiny.adapter("nested").items()))
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError) as caught:
        tiny.train(job)
    assert f"gradient of {name} is not finite at step 1" in str(caught.value)


# ---- checkpoints


def interrupted(workshop: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training that broke down with checkpoints 2 and 4 behind it; its checkpoints' folder."""
    Poisoned.count = 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Poisoned)
        with pytest.raises(TrainingError):
            workshop(**{"stages.streams.control": False}).train_all(folder)
    return folder / "nested"


@pytest.mark.parametrize("damage", ["unsealed", "truncated", "lost", "torn seal"])
def test_a_torn_checkpoint_is_passed_over(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    (expected,) = workshop(**{"stages.streams.control": False}).train_all(tmp_path / "undisturbed")
    folder = interrupted(workshop, tmp_path / "torn", monkeypatch)
    newest = folder / "checkpoint-4"
    weights = next(newest.rglob("learned.safetensors"))
    if damage == "unsealed":
        (newest / "complete").unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "lost":
        (newest / "optimizer.pt").unlink()
    else:
        (newest / "complete").write_bytes((newest / "complete").read_bytes()[:20])
    found = last_checkpoint(folder)
    assert found == folder / "checkpoint-2"
    assert not newest.exists()
    (resumed,) = workshop(**{"stages.streams.control": False}).train_all(tmp_path / "torn")
    assert losses(resumed) == pytest.approx(losses(expected), abs=1e-6)


def test_what_is_no_checkpoint_is_left_alone_or_removed(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(workshop, tmp_path, monkeypatch)
    (folder / "checkpoint-4.bak").mkdir()
    (folder / "checkpoint-90").write_text("a file")
    (folder / "checkpoint-91").symlink_to(folder / "nowhere")
    assert last_checkpoint(folder) == folder / "checkpoint-4"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-4.bak",
    ]


def test_without_any_whole_checkpoint_training_starts_again(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(workshop, tmp_path, monkeypatch)
    for seal in folder.rglob("complete"):
        seal.unlink()
    (training,) = workshop(**{"stages.streams.control": False}).train_all(tmp_path)
    assert [point.step for point in training.train_loss] == list(range(1, 9))
    assert [path.name for path in folder.iterdir()] == ["finished"]
    assert sorted(path.name for path in (folder / "finished").iterdir()) == [
        "complete",
        "learned.safetensors",
        "training.json",
    ]


def test_the_best_point_is_what_is_kept(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a small set is learned by heart: validation gets worse from step 6 on."""
    worse = iter([0.0, 0.0, 0.0, 5.0, 5.0])

    def measured(*arguments: Any) -> dict[str, list[float]]:
        more = next(worse)
        found = document_losses(*arguments)
        return {name: [loss + more for loss in each] for name, each in found.items()}

    monkeypatch.setattr("recycle.train.validation.document_losses", measured)
    tiny = workshop(**{"training.validation_steps": 2, "stages.streams.control": False})
    (record,) = tiny.train_all(tmp_path)
    assert record.kept_step == 4
    with OutputHead(tiny.model.eval()) as head:
        passes = [Pass(tiny.plans()[0].active, ["P = 2", "P = 4"])]
        found = document_losses(head, passes, tiny.splits.validation[0], 4)
    kept = {name: pytest.approx(statistics.fmean(x), abs=1e-5) for name, x in found.items()}
    assert record.curve[2].validation_loss == kept
    assert [path.name for path in (tmp_path / "nested").iterdir()] == ["finished"]


def test_operations_are_counted_once(
    workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = workshop(**{"stages.streams.control": False}).train_all(tmp_path / "whole")
    interrupted(workshop, tmp_path / "torn", monkeypatch)
    (resumed,) = workshop(**{"stages.streams.control": False}).train_all(tmp_path / "torn")
    assert whole.flops_per_token is not None
    # Forward and backward of four streams: at least four products for each weight of a matrix.
    assert whole.flops_per_token > 4 * 4 * 2 * (4 * 64 * 64)
    assert resumed.flops_per_token == whole.flops_per_token
