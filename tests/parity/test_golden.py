"""Parity with upstream's own code (transformers 4.51.3, float32) on its checkpoint format.

The tolerances are those of the issue: upstream's own eager and sdpa differ by up to 7e-5.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import recycle
from recycle.parscale.upstream import import_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = {"qwen2-p2": 2, "qwen2-p4-tied": 4}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def imported(request, tmp_path_factory):
    """An imported golden checkpoint, its P and what upstream computed from it."""
    folder = import_checkpoint(
        GOLDEN / request.param, tmp_path_factory.mktemp("golden") / "adapter"
    )
    expected = load_file(GOLDEN / request.param / "expected.safetensors")
    return folder, CHECKPOINTS[request.param], expected


@pytest.fixture(params=["eager", "sdpa"])
def golden(request, imported):
    folder, p, expected = imported
    model = recycle.load(folder, dtype=torch.float32, attn_implementation=request.param)
    assert recycle.get_p(model) == p
    return model, expected


def generate(model, ids, **options):
    return model.generate(input_ids=ids, do_sample=False, eos_token_id=None, **options)


def check_logits(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_and_loss(golden, use_cache):
    model, expected = golden
    output = model(expected["input_ids"], labels=expected["input_ids"], use_cache=use_cache)
    check_logits(output.logits, expected["logits"])
    torch.testing.assert_close(output.loss, expected["loss"].squeeze(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_in_pieces_through_the_cache(golden):
    model, expected = golden
    ids, cache, pieces = expected["input_ids"], None, []
    for piece in ids.split([3, 1, 5, ids.shape[1] - 9], dim=1):
        output = model(piece, past_key_values=cache)
        cache = output.past_key_values
        pieces.append(output.logits)
    check_logits(torch.cat(pieces, dim=1), expected["logits"])


@torch.no_grad()
def test_logits_compiled(golden):
    model, expected = golden
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    check_logits(compiled(expected["input_ids"], use_cache=False).logits, expected["logits"])


def test_loss_with_gradient_checkpointing(golden):
    model, expected = golden
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(expected["input_ids"], labels=expected["input_ids"]).loss
    torch.testing.assert_close(loss, expected["loss"].squeeze(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["cached", "uncached", "static"],
)
def test_generated_tokens(golden, options):
    model, expected = golden
    ids = expected["input_ids"]
    assert torch.equal(generate(model, ids, max_new_tokens=12, **options), expected["greedy"])
    beams = generate(model, ids, max_new_tokens=10, num_beams=3, **options)
    assert torch.equal(beams, expected["beam3"])
    padded = generate(
        model,
        expected["left_padded_input_ids"],
        attention_mask=expected["left_padded_attention_mask"],
        max_new_tokens=12,
        **options,
    )
    assert torch.equal(padded, expected["left_padded_greedy"])
