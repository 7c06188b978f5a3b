"""Memory of a training: what checkpointing keeps, and what is said where memory is too small."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from recycle.cost.inference import Numbers
from recycle.cost.shape import model_shape
from recycle.cost.shortage import advice, enough_memory, halved, is_out_of_memory
from recycle.cost.training import Learner, memory, operations
from recycle.errors import RecycleError
from recycle.evaluate import OutputHead
from recycle.evaluate import head as head_module
from recycle.parscale import ActiveStreams, ParScaleConfig, checkpointing_arguments
from recycle.recipe import resolve
from recycle.run.folder import Found
from recycle.run.plan import plan_run
from recycle.train.shortage import in_training, in_validation
from tests.runs import assert_refused, command_here, environment, write_recipe
from tests.tiny import tiny_model

LAYERS = 8
LEVELS = (False, "selective", True)


class Kept(TorchDispatchMode):
    """The bytes of all tensors that were made inside and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter(args) if isinstance(x, torch.Tensor)}
        for x in tree_iter(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:  # no view
                storage = x.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return found

    def bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def model_with(kind: str, **sizes: Any) -> Any:
    model = tiny_model(num_hidden_layers=LAYERS, **sizes)
    if kind == "lora":
        targets = "all-linear"
        return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    streams = {"num_streams": 4, "p_values": [2, 4], "num_virtual_tokens": 4, "init": "random"}
    return get_peft_model(model, ParScaleConfig(**streams))


def passed(model: Any, kind: str, level: Any) -> tuple[float, dict[str, torch.Tensor], int]:
    """The loss, the gradients, and bytes kept between the forward and the backward pass."""
    ids = (torch.arange(96).view(2, 48) * 7) % 384
    active = None if kind == "lora" else ActiveStreams("default", 4, (2, 4))
    if level:
        model.gradient_checkpointing_enable(checkpointing_arguments(level))
    model.train().zero_grad()
    with OutputHead(model) as head, Kept() as kept:
        loss = -head.log_probs(active, ids, ids).mean()
        found = kept.bytes()
    loss.backward()
    if level:
        model.gradient_checkpointing_disable()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, found


@pytest.mark.parametrize("kind", ["streams", "lora"])
def test_selective_checkpointing_computes_the_same_and_keeps_less(kind: str) -> None:
    model = model_with(kind)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then A has no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    found = {level: passed(model, kind, level) for level in LEVELS}
    loss, gradients, most = found[False]
    assert len(gradients) > 10
    for level in LEVELS[1:]:
        assert found[level][0] == pytest.approx(loss, abs=1e-6)
        assert found[level][1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[level][1][name], gradient, atol=1e-6, rtol=1e-6)
    assert found[True][2] < 0.6 * found["selective"][2] < 0.6 * 0.95 * most


def test_products_are_not_computed_again() -> None:
    model, ids = model_with("streams"), torch.arange(48)[None]
    seen: dict[Any, list[str]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen[level].append(op._schema.name)
            return op(*args, **(kwargs or {}))

    for level in LEVELS:
        seen[level] = []
        if level:
            model.gradient_checkpointing_enable(checkpointing_arguments(level))
        model.train()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        with Watch():
            loss.backward()
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [seen[level].count(attention) for level in LEVELS] == [0, 0, LAYERS]
    products = [sum(name in ("aten::mm", "aten::addmm") for name in seen[x]) for x in LEVELS]
    assert products[0] + LAYERS > products[1]  # a few are cheap
    assert products[2] > products[0] + 5 * LAYERS
    norms = [seen[level].count("aten::rsqrt") for level in LEVELS]
    assert norms[1] == norms[2] > norms[0]


def test_what_is_planned_for_checkpointing() -> None:
    model = tiny_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    shape, numbers = model_shape(model), Numbers("float32")
    learner = Learner((2, 4), 0, False, block_size=512, prefix=4)
    gib = [memory(shape, numbers, learner, 4, level) for level in LEVELS]
    assert gib[0] > 1.1 * gib[1] > 1.1 * 1.5 * gib[2]
    flops = [operations(shape, learner, level)[0] for level in LEVELS]
    assert flops[0] == flops[1] < flops[2]
    one = replace(learner, at_once=1)
    assert memory(shape, numbers, one, 4) < 0.5 * gib[0]
    assert operations(shape, one)[0] == flops[2]  # groups of streams are computed twice


@pytest.mark.parametrize("kind", ["streams", "lora"])
def test_planned_bytes_are_those_kept(kind: str) -> None:
    """Selectively, to a quarter, as for the other counts."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    model = model_with(kind, **sizes)
    shape, numbers = model_shape(tiny_model(num_hidden_layers=LAYERS, **sizes)), Numbers("float32")
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    learner = Learner((1,), lora, True, block_size=48, prefix=0)
    if kind == "streams":
        learner = Learner((2, 4), 0, False, block_size=48, prefix=4)

    def planned(level: Any) -> float:
        return memory(shape, numbers, learner, 2, level) * 2**30

    kept = {level: passed(model, kind, level)[2] for level in ("selective", True)}
    told = planned("selective") - planned(True)
    assert told == pytest.approx(kept["selective"] - kept[True], rel=0.25)


# ---- out of memory


def real_error() -> RuntimeError:
    """What torch raises where a CPU has no more memory."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def test_errors_of_memory() -> None:
    assert is_out_of_memory(real_error())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert [halved(8), halved(7), halved(12, 12), halved(9, 9)] == [4, 3, 6, 3]
    with pytest.raises(RuntimeError, match="shapes"), enough_memory(RecycleError, "x", _nothing):
        raise RuntimeError("shapes")
    said = r"Out of memory in x: .*memory.*\. Nothing of the recipe takes less"
    with pytest.raises(RecycleError, match=said), enough_memory(RecycleError, "x", _nothing):
        raise real_error()


def _nothing() -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"training.micro_batch_size": 4},
            "Set training.micro_batch_size=2 (now 4) and training.gradient_checkpointing=selective "
            "(now false). Give the same command again with these: it goes on from what is kept.",
        ),
        (
            {"stages.streams.micro_batch_size": 2, "training.gradient_checkpointing": "selective"},
            "Set stages.streams.micro_batch_size=1 (now 2) and "
            "training.gradient_checkpointing=true (now selective). Give",
        ),
        (
            {"training.micro_batch_size": 1},
            "Set training.gradient_checkpointing=true (now false) and stages.streams.at_once=2 "
            "(now 4). Give",
        ),
        (
            {
                "training.micro_batch_size": 1,
                "training.gradient_checkpointing": True,
                "stages.streams.at_once": 1,
            },
            "Set data.block_size=16 (now 32) and backbone.quantization=nf4 (now none). With these "
            "it is another recipe: start it with --new.",
        ),
    ],
)
def test_what_to_change(
    tmp_path: Path, tiny_folder: Path, changes: dict[str, Any], told: str
) -> None:
    recipe = resolve(str(write_recipe(tmp_path, tiny_folder, **changes))).recipe
    plan = plan_run(Found(recipe, tmp_path, None)).trainings[0]
    model = tiny_model()
    assert advice(in_training(plan, model)).startswith(told)
    if plan.at_once is None:
        words = "Set evaluation.batch_size=2 (now 4) and stages.streams.at_once=2 (now 4). Give"
        assert advice(in_validation(plan, model, 4)).startswith(words)


@pytest.mark.parametrize("place", ["training", "validation", "comparison"])
def test_a_run_without_memory_says_what_to_change_and_goes_on(
    tmp_path: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    recipe = write_recipe(tmp_path, tiny_folder, **{"stages.streams.control": False})
    run, error = command_here(capsys, monkeypatch), real_error()
    monkeypatch.chdir(tmp_path)
    true, calls = head_module.OutputHead.log_probs, {"training": 0, "other": 0}

    def log_probs(self: Any, active: Any, *args: Any, **kwargs: Any) -> Any:
        learns = torch.is_grad_enabled()
        calls["training" if learns else "other"] += 1
        compares = not learns and active is not None and active.apart
        # The fifth step's; the second validation's, of 4 steps.
        where = {
            "training": learns and calls["training"] == 14,
            "validation": not learns and calls["training"] > 8,
            "comparison": compares,
        }
        if where[place]:
            raise error
        return true(self, active, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(head_module.OutputHead, "log_probs", log_probs)
        done = run("run", recipe)
    fields = {
        "training": ("training.micro_batch_size=1", "training.gradient_checkpointing=selective"),
        "validation": ("evaluation.batch_size=2", "stages.streams.at_once=2"),
        "comparison": ("evaluation.batch_size=2", "stages.streams.at_once=2"),
    }[place]
    assert_refused(done, f"Out of memory in {'the ' * (place == 'comparison')}{place}", *fields)
    kept = list((tmp_path / "runs" / "tiny" / "checkpoints" / "nested").iterdir())
    assert [x for x in kept if x.name.startswith(("checkpoint-", "finished"))]
    again = [f for f in fields if "at_once" not in f]
    done = run("run", recipe, *again)
    assert done.returncode == 0, done.stderr
    assert "going on from a checkpoint" in done.stdout


def test_an_address_space_that_is_too_small() -> None:
    """A real allocation that fails, in a process of its own."""
    code = (
        "import resource, torch\n"
        "from recycle.errors import RecycleError\n"
        "from recycle.cost.shortage import enough_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))\n"
        "changes = [('evaluation.batch_size', 1, 2)]\n"
        "with enough_memory(RecycleError, 'training', lambda: iter(changes)):\n"
        "    torch.ones(2**32)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert "RecycleError: Out of memory in training: DefaultCPUAllocator: can't" in done.stderr, (
        done.stderr
    )
    assert "Set evaluation.batch_size=1 (now 2). Give the same command" in done.stderr
