"""Losses, speeds and cache sizes of the backbone, the control and each P."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from recycle.data import Document
from recycle.evaluate.losses import (
    REPEATS,
    Contender,
    contenders,
    document_losses,
    kv_bytes_per_token,
    passes,
    speeds,
)
from recycle.parscale.initialise import streams_of
from recycle.parscale.prefix import ActiveStreams
from recycle.parscale.streams import choose_streams
from tests.adapters import scramble, stream_config, token_ids
from tests.tiny import tiny_model


def family(nested: bool, backbone: str = "qwen2") -> Any:
    """A scrambled family of P = 2, 4 with a control."""
    configs = {"nested": (2, 4)} if nested else {"p2": (2,), "p4": (4,)}
    model: Any = tiny_model(backbone)
    for name, p_values in {**configs, "control": (1,)}.items():
        config = stream_config(p_values)
        if hasattr(model, "add_adapter") and hasattr(model, "peft_config"):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    scramble(model)
    return model.eval()


@pytest.fixture(scope="module", params=[True, False], ids=["nested", "independent"])
def model(request: pytest.FixtureRequest) -> Any:
    return family(request.param)


DOCUMENTS = [
    Document(f"d{row}", f"d{row}", tokens.tolist(), 100)
    for row, tokens in enumerate(token_ids(5, 24))
]
NAMES = ["backbone", "control", "P = 2", "P = 4"]


def test_the_order_of_the_table(model: Any) -> None:
    models = contenders(streams_of(model))
    assert [contender.name for contender in models] == NAMES
    assert [contender.num_streams for contender in models] == [1, 1, 2, 4]


def test_one_pass_serves_a_nested_family(model: Any) -> None:
    groups = passes(contenders(streams_of(model)))
    names = [[contender.name for contender in group] for group in groups]
    nested = "nested" in model.peft_config
    together = [["P = 2", "P = 4"]] if nested else [["P = 2"], ["P = 4"]]
    assert names == [["backbone"], ["control"], *together]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_losses_are_those_of_each_document_on_its_own(model: Any, batch_size: int) -> None:
    layer = streams_of(model)
    done: list[int] = []
    found = document_losses(
        model, layer, contenders(layer), DOCUMENTS, batch_size, advance=done.append
    )
    assert list(found) == NAMES
    bare = tiny_model()
    for contender in contenders(layer):
        for document, loss in zip(DOCUMENTS, found[contender.name], strict=True):
            ids = torch.tensor([document.input_ids])
            with torch.no_grad(), choose_streams(layer, contender.streams):
                alone = bare if contender.streams is None else model
                logits = alone(input_ids=ids).logits
            expected = F.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
            assert loss == pytest.approx(expected, abs=1e-5)  # batches of other sizes
    assert len({round(found[name][0], 4) for name in NAMES}) == 4
    # Each pass counts the streams it ran: 1 + 1 + 4 nested, 1 + 1 + 2 + 4 on their own.
    streams = 6 if "nested" in model.peft_config else 8
    assert sum(done) == streams * 5 * 24


def test_nothing_is_left_behind(model: Any) -> None:
    layer = streams_of(model)
    model.train()
    before = layer.selection()
    document_losses(model, layer, contenders(layer), DOCUMENTS, 4)
    assert model.training
    assert layer.selection() == before
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_speeds(model: Any) -> None:
    layer = streams_of(model)
    done: list[int] = []
    found = speeds(model, layer, contenders(layer), 12, 3, advance=done.append)
    assert list(found) == NAMES
    assert sum(done) == (REPEATS + 1) * 4
    for speed in found.values():
        assert speed.train_tokens_per_second is None
        assert 0 < speed.decode_tokens_per_second < 1e5
        assert 0 < speed.prefill_tokens_per_second < 1e7


@pytest.mark.parametrize(
    ("backbone", "per_stream"),
    [
        ("qwen2", 2 * 2 * 2 * 16 * 4),  # keys and values, layers, heads, head size, bytes
        ("gpt2", 2 * 2 * 4 * 16 * 4),
    ],
)
def test_cache_sizes(backbone: str, per_stream: int) -> None:
    tiny = family(True, backbone)
    layer = streams_of(tiny)
    assert kv_bytes_per_token(tiny, layer, contenders(layer)) == {
        "backbone": per_stream,
        "control": per_stream,
        "P = 2": 2 * per_stream,
        "P = 4": 4 * per_stream,
    }


def test_cache_sizes_follow_the_dtype() -> None:
    half = family(True).to(torch.bfloat16)
    layer = streams_of(half)
    models = [Contender("backbone", None), Contender("P = 4", ActiveStreams("nested", 4, (4,)))]
    assert kv_bytes_per_token(half, layer, models) == {"backbone": 256, "P = 4": 1024}
