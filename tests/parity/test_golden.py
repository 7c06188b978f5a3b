"""Parity with upstream's own code (transformers 4.51.3, float32) on its checkpoint format.

The tolerances are those of the issue: upstream's own eager and sdpa differ by up to 7e-5.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import StaticCache

import recycle
from recycle.upstream.importer import import_checkpoint

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
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_logits_and_loss_compiled(golden, backend):
    model, expected = golden
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids = expected["input_ids"]
    output = compiled(ids, labels=ids, use_cache=False)
    check_logits(output.logits, expected["logits"])
    torch.testing.assert_close(output.loss, expected["loss"].squeeze(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_in_a_static_cache(golden):
    model, expected = golden
    ids, pieces = expected["input_ids"], []
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 3)
    for piece in ids.split([3, 1, 5, ids.shape[1] - 9], dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    check_logits(torch.cat(pieces, dim=1), expected["logits"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_logits_and_loss_with_gradient_checkpointing(golden, reentrant):
    model, expected = golden
    ids = expected["input_ids"]
    for parameter in trained(model):
        parameter.requires_grad_()
    model.train()
    runs = [gradients(model, ids)]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    output = model(ids, labels=ids)
    check_logits(output.logits, expected["logits"])
    torch.testing.assert_close(output.loss, expected["loss"].squeeze(), atol=1e-5, rtol=0)
    runs.append(gradients(model, ids))
    for without, checkpointed in zip(*runs, strict=True):
        assert without.abs().max() > 0
        torch.testing.assert_close(checkpointed, without, atol=1e-6, rtol=0)


def trained(model):
    return [parameter for name, parameter in model.named_parameters() if "parscale_" in name]


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in trained(model)]


def check_tokens(model, expected, **options):
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


@pytest.mark.parametrize(
    "options",
    [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["cached", "uncached", "static"],
)
def test_generated_tokens(golden, options):
    check_tokens(*golden, **options)


def test_generated_tokens_compiled(golden):
    """Prefill and steps in one graph each, as `generate` calls them with a static cache."""
    model, expected = golden
    torch._dynamo.reset()
    causal_lm = model.get_base_model()
    causal_lm.forward = torch.compile(causal_lm.forward, fullgraph=True, backend="eager")
    check_tokens(model, expected, cache_implementation="static", disable_compile=True)


def test_generated_tokens_with_gradient_checkpointing(golden):
    """Switched on but not training, it changes nothing and keeps the cache."""
    model, expected = golden
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check_tokens(model, expected)
