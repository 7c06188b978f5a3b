"""Streams in groups: the gradients of one pass, with the activations of one group at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from recycle.data import Document
from recycle.evaluate import OutputHead, document_losses, passes_of
from recycle.evaluate.diversity import StreamWatch
from recycle.parscale import ActiveStreams, streams_of
from tests.adapters import stream_model, token_ids
from tests.families.configs import family_model

NESTED = ActiveStreams("default", 4, (2, 4))
APART = ActiveStreams("default", 4, (2, 4), apart=True)
IDS = token_ids(3, 11)


def gradients(
    model: Any, active: ActiveStreams, at_once: int | None, ids: Tensor
) -> dict[str, Tensor]:
    """Of a loss in which every position weighs differently; and the log-probabilities."""
    model.zero_grad(set_to_none=True)
    with OutputHead(model, streams_at_once=at_once) as head:
        found = head.log_probs(active, ids, ids)
        weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(5))
        (weights * found).mean().backward()
    return {"log_probs": found.detach()} | {
        name: x.grad for name, x in model.named_parameters() if x.grad is not None
    }


def assert_the_same(model: Any, active: ActiveStreams, at_once: int, ids: Tensor = IDS) -> None:
    expected, found = (gradients(model, active, k, ids) for k in (None, at_once))
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("active", [NESTED, APART], ids=["merged", "apart"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_one_pass(
    at_once: int, active: ActiveStreams, checkpointing: bool
) -> None:
    model = stream_model(init="random").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_the_same(model, active, at_once)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_neox", "modernbert-decoder"])
def test_of_other_models(model_type: str) -> None:
    ids = IDS % 100  # of a smaller vocabulary
    model = stream_model(family_model(model_type), init="random").train()
    assert_the_same(model, NESTED, 3, ids)


def test_one_groups_activations_are_held_at_a_time() -> None:
    """What the decoder's layers keep for the backward pass, in the order in which it is needed."""
    model = stream_model(init="random").train()
    mlp = model.get_base_model().model.layers[0].mlp
    rows: list[int] = []
    kept: dict[int | None, int] = {}
    for at_once in (None, 1):
        kept[at_once] = 0

        def pack(tensor: Tensor, at_once: int | None = at_once) -> Tensor:
            kept[at_once] += tensor.numel() * (tensor.ndim > 1 and tensor.shape[-1] == 128)
            return tensor

        rows.clear()
        with (
            mlp.register_forward_hook(lambda module, inputs, output: rows.append(len(output))),
            OutputHead(model, streams_at_once=at_once) as head,
        ):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                found = head.log_probs(ActiveStreams("default", 4, (4,)), IDS, IDS)
            found.sum().backward()
        assert rows == [3 * 4] if at_once is None else rows == [3] * 4 * 2  # and once more each
    assert kept[1] == 0 < kept[None]  # of the inner layers of the MLPs, with a width of 128


def test_validation_in_groups() -> None:
    model = stream_model(init="random")
    documents = [Document(f"d{i}", "g", x, x, 100) for i, x in enumerate(IDS.tolist())]
    found = {}
    for at_once in (None, 3):
        with OutputHead(model, streams_at_once=at_once) as head:
            watch = StreamWatch(head)
            losses = document_losses(watch, passes_of(model), documents, 2)
        found[at_once] = losses, watch.use(NESTED)
    for name, each in found[None][0].items():
        assert found[3][0][name] == pytest.approx(each, abs=1e-6)
    assert found[3][1] is not None
    assert found[None][1] is not None
    assert found[3][1].weights == pytest.approx(found[None][1].weights, abs=1e-6)
    assert streams_of(model).selection.current() == ActiveStreams("default", 4, (4,))
