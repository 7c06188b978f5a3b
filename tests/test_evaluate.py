"""Losses, speeds and cache sizes of the backbone, the control and each P."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from recycle.data import Document
from recycle.evaluate import OutputHead, document_losses, passes_of
from recycle.evaluate.passes import rows_of
from recycle.evaluate.speed import REPEATS, kv_bytes_per_token, speeds
from recycle.parscale import ActiveStreams, choose_streams, streams_of
from tests.adapters import scramble, stream_config, stream_model, token_ids
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
    Document(f"d{row}", f"d{row}", tokens.tolist(), tokens.tolist(), 100)
    for row, tokens in enumerate(token_ids(5, 24))
]
NAMES = ["backbone", "control", "P = 2", "P = 4"]


def test_the_order_of_the_table(model: Any) -> None:
    rows = rows_of(passes_of(model))
    assert list(rows) == NAMES
    assert [active and active.p_values for active in rows.values()] == [None, (1,), (2,), (4,)]
    assert next(iter(rows_of(passes_of(model, "P = 1")))) == "P = 1"


def test_one_pass_serves_a_nested_family(model: Any) -> None:
    names = [names for _, names in passes_of(model)]
    nested = "nested" in model.peft_config
    together = [["P = 2", "P = 4"]] if nested else [["P = 2"], ["P = 4"]]
    assert names == [["backbone"], ["control"], *together]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_losses_are_those_of_each_document_on_its_own(model: Any, batch_size: int) -> None:
    done: list[int] = []
    passes = passes_of(model)
    with OutputHead(model) as head:
        found = document_losses(head, passes, DOCUMENTS, batch_size, advance=done.append)
    assert list(found) == NAMES
    bare = tiny_model()
    for name, active in rows_of(passes).items():
        for document, loss in zip(DOCUMENTS, found[name], strict=True):
            ids = torch.tensor([document.input_ids])
            with torch.no_grad(), choose_streams(model, active):
                alone = bare if active is None else model
                logits = alone(input_ids=ids).logits
            expected = F.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
            assert loss == pytest.approx(expected, abs=1e-5)  # batches of other sizes
    assert len({round(found[name][0], 4) for name in NAMES}) == 4
    # Each pass counts the streams it ran: 1 + 1 + 4 nested, 1 + 1 + 2 + 4 on their own.
    streams = 6 if "nested" in model.peft_config else 8
    assert sum(done) == streams * 5 * 24


def test_shorter_documents_have_the_losses_that_they_have_alone(model: Any) -> None:
    """Padding on the right, and tokens that are not predicted, change nothing."""
    documents = []
    for row, tokens in enumerate(token_ids(4, 24).tolist()):
        ids = tokens[: 24 - 5 * row]
        documents.append(Document(f"d{row}", "g", ids, [*[-100] * 4, *ids[4:]], 100))
    with OutputHead(model) as head:
        together = document_losses(head, passes_of(model), documents, 4)
        alone = document_losses(head, passes_of(model), documents, 1)
    for name, losses in together.items():
        assert losses == pytest.approx(alone[name], abs=1e-5)


def test_packed_sequences_have_the_losses_that_they_have_alone() -> None:
    tiny = stream_model(tiny_model(), init="random")
    scramble(tiny)
    active = ActiveStreams("default", 4, (2, 4))
    ids = token_ids(2, 24)
    labels = ids.clone()
    labels[:, [0, 9]] = -100
    positions = torch.cat([torch.arange(9), torch.arange(15)]).repeat(2, 1)
    with OutputHead(tiny) as head, torch.no_grad():
        apart = [head.log_probs(active, part, part) for part in (ids[:, :9], ids[:, 9:])]
        packed = head.log_probs(active, ids, labels, positions)
        seen = head.log_probs(active, ids, labels)
    torch.testing.assert_close(packed[..., :8], apart[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(packed[..., 9:], apart[1], atol=1e-4, rtol=0)
    assert (packed[..., 8] == 0).all()  # the first token of the second sequence
    assert (seen[..., 9:] - apart[1]).abs().max() > 1e-2


def test_nothing_is_left_behind(model: Any) -> None:
    before = streams_of(model).selection.current()
    with OutputHead(model) as head:
        document_losses(head, passes_of(model), DOCUMENTS, 4)
    assert streams_of(model).selection.current() == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "forward" not in vars(model.get_base_model())


def test_speeds(model: Any) -> None:
    done: list[int] = []
    found = speeds(model, rows_of(passes_of(model)), 12, 3, advance=done.append)
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
    assert kv_bytes_per_token(tiny, rows_of(passes_of(tiny))) == {
        "backbone": per_stream,
        "control": per_stream,
        "P = 2": 2 * per_stream,
        "P = 4": 4 * per_stream,
    }


def test_cache_sizes_follow_the_dtype() -> None:
    half = family(True).to(torch.bfloat16)
    rows = {"backbone": None, "P = 4": ActiveStreams("nested", 4, (4,))}
    assert kv_bytes_per_token(half, rows) == {"backbone": 256, "P = 4": 1024}
