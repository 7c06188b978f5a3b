"""Learned keys and values in front of the text's, against a plain computation of attention."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from recycle.parscale import ActiveStreams, ParScaleConfig
from recycle.parscale.active import Selection, this_thread
from recycle.parscale.prefix import StreamPrefix, attend

B, P, H, N, S, D = 2, 3, 2, 4, 5, 8
GROUPS = 2  # query heads of each key-value head


class Attention(nn.Module):
    num_key_value_groups = GROUPS
    is_causal = True


def stream_prefix(module, num_streams, shape):
    """The prefix of an attention module, as the tuner adds it."""
    config = ParScaleConfig(
        num_streams=num_streams,
        num_virtual_tokens=N,
        init="random",
        attention_shapes={"attention": shape},
    )
    prefix = StreamPrefix(module, Selection())
    prefix.add("default", config, "attention", torch.device("cpu"))
    return prefix


@pytest.fixture
def module():
    module = Attention()
    prefix = stream_prefix(module, 4, [H, D, D])
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.normal_()
    module.add_module(StreamPrefix.child_name, prefix)
    return module


@pytest.fixture
def active():
    this_thread.forward.active = ActiveStreams("default", P, (P,))
    yield
    this_thread.forward.active = None


def by_hand(module, query, key, value):
    """Causal attention of each row over its stream's prefix and the text."""
    prefix = getattr(module, StreamPrefix.child_name)
    output = torch.empty(B * P, S, H * GROUPS, D)
    for row in range(B * P):
        for head in range(H * GROUPS):
            k = torch.cat(
                [prefix.parscale_keys["default"][row % P, head // GROUPS], key[row, head // GROUPS]]
            )
            v = torch.cat(
                [
                    prefix.parscale_values["default"][row % P, head // GROUPS],
                    value[row, head // GROUPS],
                ]
            )
            for position in range(S):
                seen = N + position + 1
                weights = torch.softmax(k[:seen] @ query[row, head, position] / D**0.5, dim=0)
                output[row, position, head] = weights @ v[:seen]
    return output


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "broadcast"])
def test_every_query_sees_the_whole_prefix_of_its_stream(module, active, mask):
    query = torch.randn(B * P, H * GROUPS, S, D)
    key, value = torch.randn(2, B * P, H, S, D)
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    masks = {
        "none": None,
        "bool": causal.expand(B * P, 1, S, S),
        "additive": torch.zeros(B * P, 1, S, S).masked_fill(~causal, -1e9),
        "broadcast": causal[None, None],
    }
    with torch.no_grad():
        output, _ = attend(sdpa_attention_forward, "sdpa", module, query, key, value, masks[mask])
        expected = by_hand(module, query, key, value)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "broadcast"])
def test_one_query_sees_prefix_and_text(module, active, mask):
    query = torch.randn(B * P, H * GROUPS, S, D)
    key, value = torch.randn(2, B * P, H, S, D)
    room = torch.randn(B * P, H, 3, D)  # of a static cache, behind the text
    seen = (torch.arange(S + 3) < S).expand(1, 1, 1, -1)
    masks = {
        "none": None,
        "bool": seen.expand(B * P, 1, 1, -1),
        "additive": torch.zeros(B * P, 1, 1, S + 3).masked_fill(~seen, -1e9),
        "broadcast": seen,
    }
    longer = [x if mask == "none" else torch.cat([x, room], dim=2) for x in (key, value)]
    with torch.no_grad():
        output, _ = attend(
            sdpa_attention_forward, "sdpa", module, query[:, :, -1:], *longer, masks[mask]
        )
        expected = by_hand(module, query, key, value)[:, -1:]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_querys_scores_are_as_exact_as_those_of_several(module, active, dtype):
    """Large ones: in the dtype itself they would be rounded, or overflow."""
    query = (20 * torch.randn(B * P, H * GROUPS, S, D)).to(dtype)
    key, value = (20 * torch.randn(B * P, H, S, D)).to(dtype), torch.randn(B * P, H, S, D).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))
        exact = by_hand(module, query.float(), key.float(), value.float())[:, -1:]
        one, _ = attend(sdpa_attention_forward, "sdpa", module, query[:, :, -1:], key, value, None)
        all_, _ = attend(sdpa_attention_forward, "sdpa", module, query, key, value, None)
    error, allowed = (x.float().sub(exact).abs().mean() for x in (one, all_[:, -1:]))
    assert error <= 1.2 * allowed + 1e-4
    huge = torch.full((B * P, H * GROUPS, 1, D), 200.0, dtype=dtype)
    one, _ = attend(sdpa_attention_forward, "sdpa", module, huge, key + 200, value, None)
    assert torch.isfinite(one).all()


def test_without_streams_or_prefix_the_function_is_called_as_it_is(module):
    inputs = tuple(torch.randn(1, H, S, D) for _ in range(3))
    calls = []

    def attention(*args, **kwargs):
        calls.append((args, kwargs))
        return inputs[0], None

    attend(attention, "sdpa", module, *inputs, None, dropout=0.5)
    this_thread.forward.active = ActiveStreams("default", P, (P,))
    try:
        attend(attention, "sdpa", Attention(), *inputs, None, dropout=0.5)
    finally:
        this_thread.forward.active = None
    for args, kwargs in calls:
        assert all(a is b for a, b in zip(args[1:4], inputs, strict=True))
        assert kwargs == {"dropout": 0.5}
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefix_takes_the_dtype_of_the_text(module, dtype):
    key = torch.zeros(B * P, H, S, D, dtype=dtype)
    keys, values = getattr(module, StreamPrefix.child_name).prepend(
        ActiveStreams("default", P, (P,)), key, key
    )
    assert keys.dtype == values.dtype == dtype
    assert keys.shape == (B * P, H, N + S, D)
    for row in range(B * P):
        start = getattr(module, StreamPrefix.child_name).parscale_keys["default"][row % P]
        assert torch.equal(keys[row, :, :N], start.to(dtype))
        assert keys[row, :, N:].count_nonzero() == 0


def test_keys_and_values_may_have_other_sizes():
    prefix = stream_prefix(Attention(), P, [H, 6, 10])
    keys, values = prefix.prepend(
        ActiveStreams("default", 2, (2,)), torch.zeros(4, H, S, 6), torch.zeros(4, H, S, 10)
    )
    assert keys.shape == (4, H, N + S, 6)
    assert values.shape == (4, H, N + S, 10)
