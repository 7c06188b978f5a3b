"""Attention that is computed by hand: what the matrix of model types does not cover.

Everything is float32. Equality up to rounding is 1e-4 on logits of size 10.
"""

import copy

import pytest
import torch
from peft import get_peft_model

from recycle.family.switch import set_p
from recycle.parscale import UnsupportedModelError
from recycle.parscale.fallback import CACHE_ARGUMENT
from tests.families.checks import (
    check_cache,
    check_disabled,
    check_gradients,
    check_padding,
    check_static_cache,
    check_text_start,
    close,
    forward,
    stream_config,
    stream_model,
    token_ids,
)
from tests.families.configs import family_model

# What Falcon was released with: rotary or ALiBi, one, several or as many key heads as queries.
FALCONS = {
    "7b": {"multi_query": True, "new_decoder_architecture": False, "alibi": False},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "rw": {"multi_query": False, "num_kv_heads": 4, "alibi": True, "parallel_attn": False},
}


@pytest.mark.parametrize("kind", FALCONS)
def test_falcons(kind):
    def build():
        return family_model("falcon", "sdpa", **FALCONS[kind])

    check_text_start(build)  # with ALiBi the prefix lies at -n to -1 as well
    for check in (check_cache, check_padding, check_gradients):
        check(stream_model(build()))
    if kind != "rw":  # the backbone's own ALiBi is too short for a static cache
        check_static_cache(stream_model(build()))
    check_disabled(stream_model(build()), build())


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gptj"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model_type, reentrant):
    model = stream_model(family_model(model_type))
    ids = token_ids(2, 9)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    actual = gradients()
    assert actual.keys() == expected.keys()
    assert sum("parscale_keys" in name for name in actual) == 2
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gptj", "xglm"])
def test_compiled_equals_eager(model_type):
    torch._dynamo.reset()
    model = stream_model(family_model(model_type))
    ids = token_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(input_ids=ids, use_cache=False).logits, forward(model, ids).logits)


@torch.no_grad()
def test_unloading_leaves_nothing_behind():
    backbone = family_model("bloom")
    expected = forward(backbone, token_ids(2, 9)).logits
    model = stream_model(backbone)
    hooked = [m for m in model.modules() if type(m).__name__ in CACHE_ARGUMENT]
    assert [len(m._forward_pre_hooks) for m in hooked] == [1, 1]
    unloaded = model.unload()
    assert [len(m._forward_pre_hooks) for m in hooked] == [0, 0]
    assert torch.equal(forward(unloaded, token_ids(2, 9)).logits, expected)


def test_bloom_of_one_head_has_its_position_bias_once():
    check_text_start(lambda: family_model("bloom", n_head=1))


@torch.no_grad()
def test_a_copy_has_prefixes_of_its_own():
    model = stream_model(family_model("bloom"))
    ids = token_ids(2, 9)
    expected = forward(model, ids).logits
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "parscale_" in name:
            parameter.zero_()
    assert torch.equal(forward(model, ids).logits, expected)
    assert (forward(other, ids).logits - expected).abs().max() > 0.01


@torch.no_grad()
def test_bloom_takes_other_p_in_turn():
    model = get_peft_model(
        family_model("bloom"), stream_config(num_streams=4, p_values=[2, 4], init="random")
    ).eval()
    outputs = []
    for p in (4, 2, 1, 4):
        set_p(model, p)
        outputs.append(forward(model, token_ids(2, 9)).logits)
    assert torch.equal(outputs[0], outputs[3])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert torch.equal(outputs[2], forward(family_model("bloom"), token_ids(2, 9)).logits)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mpt", "positions that count padding"),
        ("gpt_neo", "a mask of its own in local layers"),
        ("xlnet", "in a way that is not known to take prefixes"),
        ("rwkv", "its layers are recurrent"),
    ],
)
def test_what_is_refused_says_why_and_is_left_alone(model_type, reason):
    backbone = family_model(model_type)
    before = [(name, type(module)) for name, module in backbone.named_modules()]
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        get_peft_model(backbone, stream_config())
    assert f"(model type {model_type!r})" in str(error.value)
    assert [(name, type(module)) for name, module in backbone.named_modules()] == before
    assert not any(module._forward_pre_hooks for module in backbone.modules())
