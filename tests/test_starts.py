"""Text and random starts."""

import pytest
import torch
from peft import get_peft_model

from recycle.parscale import (
    ParScaleConfig,
    UnsupportedModelError,
    start_from_text,
    start_token_ids,
)
from recycle.parscale.layer import StreamLayer
from tests.adapters import logits, scramble, stream_config, stream_model, token_ids
from tests.tiny import tiny_model, tiny_tokenizer

IDS = token_ids(2, 9)
ROPE = ["qwen2", "llama", "mistral", "qwen3", "olmo2"]


def one_stream(model, start):
    config = ParScaleConfig(
        num_streams=1, num_virtual_tokens=len(start), start_token_ids=[start.tolist()]
    )
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("model_type", ROPE)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_text_stream_is_the_backbone_after_that_text(model_type, attention):
    backbone = tiny_model(model_type, attn_implementation=attention)
    start = token_ids(6, seed=4)
    expected = logits(backbone, torch.cat([start.expand(2, -1), IDS], dim=1))[:, 6:]
    assert (logits(backbone, IDS) - expected).abs().max() > 0.1
    # Rotary positions are relative, so a shift by 6 changes no more than rounding.
    torch.testing.assert_close(
        logits(one_stream(backbone, start), IDS), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("model_type", "sizes", "reason"),
    [
        ("ministral3", {"head_dim": 16}, "scaled by a token's position"),
        ("diffllama", {}, "more than one pair of keys and values"),
    ],
)
def test_where_a_text_start_would_be_another_function_it_is_refused(model_type, sizes, reason):
    backbone = tiny_model(model_type, **sizes)
    expected = logits(backbone, IDS)
    with pytest.raises(UnsupportedModelError, match=reason):
        get_peft_model(backbone, stream_config((2,)))
    assert not any(isinstance(module, StreamLayer) for module in backbone.modules())
    model = stream_model(backbone, p_values=(2,), init="random")
    assert not torch.equal(logits(model, IDS), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), expected)


def test_a_text_without_finite_keys_is_refused():
    backbone = tiny_model()
    backbone.get_decoder().layers[1].self_attn.v_proj.bias.data[0] = float("inf")
    with pytest.raises(UnsupportedModelError, match=r"not finite in torch\.float32"):
        get_peft_model(backbone, stream_config((2,)))


def test_the_search_for_attention_leaves_modes_alone():
    backbone = tiny_model().train()
    quiet = backbone.get_decoder().layers[0].eval()
    get_peft_model(backbone, stream_config((2,)))
    assert backbone.training
    assert backbone.get_decoder().layers[1].training
    assert not quiet.training


def test_with_learned_positions_text_and_start_share_positions_0_to_n():
    """GPT-2 has no position before 0, so the start text takes 0 to n-1, as the text itself does."""
    backbone = tiny_model("gpt2")
    start = token_ids(6, seed=4)
    positions = torch.cat([torch.arange(6), torch.arange(9)]).expand(2, -1)
    ids = torch.cat([start.expand(2, -1), IDS], dim=1)
    # A mask of its own, or positions that start anew would read as two packed sequences.
    causal = torch.zeros(15, 15).masked_fill(
        ~torch.ones(15, 15, dtype=torch.bool).tril(), torch.finfo(torch.float32).min
    )
    expected = logits(
        backbone, ids, position_ids=positions, attention_mask=causal.expand(2, 1, 15, 15)
    )[:, 6:]
    torch.testing.assert_close(
        logits(one_stream(backbone, start), IDS), expected, atol=1e-4, rtol=0
    )


def test_text_streams_start_with_uniform_weights():
    starts = token_ids(4, 6, seed=7)
    model = get_peft_model(tiny_model("llama"), stream_config((2, 4))).eval()
    decoder = model.get_decoder()
    with torch.no_grad():
        merged = decoder(IDS)[0]
        alone = [one_stream(tiny_model("llama"), start).get_decoder()(IDS)[0] for start in starts]
    torch.testing.assert_close(merged, torch.stack(alone).mean(0), atol=1e-4, rtol=0)


def test_random_start_is_seeded_small_and_different_in_each_stream():
    config = ParScaleConfig(num_streams=2, num_virtual_tokens=48, init="random")
    keys = []
    for _ in range(2):
        torch.manual_seed(3)
        model = get_peft_model(tiny_model(), config)
        keys.append(next(p for name, p in model.named_parameters() if "parscale_keys" in name))
    assert torch.equal(*keys)
    assert keys[0].std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(keys[0][0], keys[0][1])


def test_an_adapter_can_be_started_anew_beside_another():
    model = stream_model(adapter_name="first")
    expected = logits(model, IDS)
    model.add_adapter("second", stream_config((2,), init="random", start_token_ids=None))
    starts = token_ids(2, 6, seed=7)
    start_from_text(model, starts, "second")
    assert torch.equal(logits(model, IDS), expected)
    model.set_adapter("second")
    fresh = get_peft_model(
        tiny_model(), stream_config((2,), start_token_ids=starts.tolist())
    ).eval()
    assert torch.equal(logits(model, IDS), logits(fresh, IDS))


def test_a_start_in_training_mode_has_no_dropout():
    model = tiny_model("gpt2").train()  # its dropout is 0.1
    started = get_peft_model(model, stream_config((2,)))
    assert started.get_decoder().training
    fresh = get_peft_model(tiny_model("gpt2"), stream_config((2,)))
    parameters = dict(fresh.named_parameters())
    for name, parameter in started.named_parameters():
        if "parscale_keys" in name or "parscale_values" in name:
            assert torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize("shape", [(3, 6), (2, 5)])
def test_starts_of_another_shape_are_refused(shape):
    model = stream_model(p_values=(2,))
    with pytest.raises(
        ValueError, match=rf"has 2 streams of 6 tokens, got \({shape[0]}, {shape[1]}\)"
    ):
        start_from_text(model, token_ids(*shape))


def test_start_token_ids_are_the_first_of_each_text():
    tokenizer = tiny_tokenizer()
    texts = ["The quick brown fox jumps over the dog", "import os, sys, json; from collections"]
    ids = start_token_ids(tokenizer, texts, 5)
    assert [len(row) for row in ids] == [5, 5]
    for row, text in zip(ids, texts, strict=True):
        assert text.startswith(tokenizer.decode(row))
    model = get_peft_model(
        tiny_model(), ParScaleConfig(num_streams=2, num_virtual_tokens=5, start_token_ids=ids)
    )
    scramble(model)
    assert logits(model, IDS).isfinite().all()


def test_a_start_text_that_is_too_short_is_refused():
    with pytest.raises(
        ValueError, match=r"num_virtual_tokens=48 tokens, and text 1 has \d+: 'short'"
    ):
        start_token_ids(tiny_tokenizer(), ["long enough " * 60, "short"], 48)
