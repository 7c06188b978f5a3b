"""Compiled layers: the same losses and gradients, one graph, and code that layers share."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from recycle.parscale import ActiveStreams, ParScaleConfig, choose_streams
from recycle.recipe import resolve
from recycle.train import TrainingError
from recycle.train.compilation import CompiledLayers
from tests.runs import write_recipe
from tests.test_train import Workshop, losses
from tests.tiny import tiny_model

NESTED = ActiveStreams("default", 4, (2, 4))
LAYERS = 5
KEPT = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
CHECKPOINTS: dict[str, dict[str, Any] | None] = {
    "all kept": None,
    "recomputed": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, KEPT),
    },
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def model_with_streams(model_type: str) -> Any:
    backbone = tiny_model(model_type, num_hidden_layers=LAYERS)
    config = ParScaleConfig(num_streams=4, p_values=[2, 4], num_virtual_tokens=6, init="random")
    return get_peft_model(backbone, config).train()


def gradients(model: Any, active: ActiveStreams | None) -> tuple[dict[str, Tensor], int]:
    """What the parameters that learn get, and the bytes that are held for the backward pass."""
    ids = torch.arange(48).view(2, 24) * 7 % 384
    held: dict[int, int] = {}
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad(set_to_none=True)
    with choose_streams(model, active):
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            logits = model(input_ids=ids, use_cache=False).logits
        logits.float().log_softmax(dim=-1)[..., 3].mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, sum(held.values())


def expect_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max() + 1e-6
        torch.testing.assert_close(actual[name] / scale, gradient / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", CHECKPOINTS)
@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "falcon"])
def test_layers_share_one_graph(model_type: str, checkpointing: str) -> None:
    model = model_with_streams(model_type)
    expected, all_kept = gradients(model, NESTED)
    settings = CHECKPOINTS[checkpointing]
    if settings is not None:
        model.gradient_checkpointing_enable(settings)
    compiled = CompiledLayers(model, backend="aot_eager")
    with compiled:
        for _ in range(2):
            found, held = gradients(model, NESTED)
    expect_equal(found, expected)
    assert not counters["graph_break"]
    # Nothing that a gradient flows to comes into the first layer, unless it is recomputed.
    assert counters["stats"]["unique_graphs"] == (2 if settings is None else 1)
    assert counters["frames"]["total"] == counters["stats"]["unique_graphs"]
    if settings is not None:
        assert held < all_kept * (0.3 if checkpointing == "recomputed" else 0.8)
    again, _ = gradients(model, NESTED)  # not compiled any more
    expect_equal(again, expected)
    compiled.release()


def test_layers_with_a_lora() -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(tiny_model(num_hidden_layers=LAYERS), lora).train()
    expected, _ = gradients(model, None)
    assert len(expected) == 2 * 7 * LAYERS
    with CompiledLayers(model, backend="aot_eager"):
        found, _ = gradients(model, None)
    expect_equal(found, expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, "selective", True])
def test_a_compiled_training_has_the_same_losses(
    tiny_folder: Path, tmp_path: Path, checkpointing: bool | str
) -> None:
    curves, validations = [], []
    for compiled in (False, True):
        changes = {
            "training.compile": compiled,
            "training.gradient_checkpointing": checkpointing,
            "training.tokens": 512,
            "stages.streams.control": False,
        }
        recipe = resolve(str(write_recipe(tmp_path, tiny_folder, **changes))).recipe
        (record,) = Workshop(recipe).train_all(tmp_path / str(compiled))
        curves.append(losses(record))
        validations.append(list(record.curve[-1].validation_loss.values()))
    # Training alone is compiled, and no validation.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert validations[1] == pytest.approx(validations[0], abs=1e-5)


def test_what_cannot_be_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Headless(torch.nn.Module):
        pass

    monkeypatch.setattr("recycle.train.compilation.find_decoder", lambda model: model)
    with pytest.raises(TrainingError, match=r"none in Headless\. Set training\.compile=false"):
        CompiledLayers(Headless())
    monkeypatch.undo()
    model = model_with_streams("qwen2")
    with (
        torch._inductor.config.patch(
            {"force_disable_caches": True, "cpp.cxx": (None, "/no/compiler")}
        ),
        pytest.raises(TrainingError, match=r"No working C\+\+ compiler .* Set training\.compile"),
        CompiledLayers(model),
    ):
        gradients(model, NESTED)
    assert not any(layer._compiled_call_impl for layer in model.get_decoder().layers)
