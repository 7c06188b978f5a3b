"""P changes in mid-generation, and all goes on as if it had always been that P."""

import copy
import itertools

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

import recycle
from recycle.parscale import CacheError, shrink_cache
from tests.adapters import logits, scramble, stream_config, stream_model, token_ids
from tests.tiny import PAD_ID, tiny_model

PAIRS = list(itertools.permutations((1, 2, 4, 3), 2))  # P = 3 was trained apart from 2 and 4
MODELS = {
    "qwen2": {},
    "gpt2": {},  # learned positions
    "bloom": {},  # attention by hand
    "mistral": {"sliding_window": 6, "head_dim": 16},
    "gemma2": {"sliding_window": 6, "head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
}
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
PROMPT = token_ids(2, 9).masked_fill(MASK == 0, PAD_ID)
OPTIONS = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    backbone = tiny_model(request.param, attn_implementation="eager", **MODELS[request.param])
    model = stream_model(backbone)
    model.add_adapter("p3", stream_config((3,)))
    scramble(model)
    return model


def generate(model, p, ids, cache=None, new=5):
    mask = F.pad(MASK, (0, ids.shape[1] - MASK.shape[1]), value=1)
    with recycle.use_p(model, p):
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, **OPTIONS
        )


def new_cache(model, kind):
    if kind == "static":
        return StaticCache(model.config, max_cache_len=32)
    return DynamicCache(config=model.config)


def states(cache):
    """Every tensor of a cache, by what it is."""
    found = {}
    for i, layer in enumerate(cache.layers):
        for name in ("keys", "values"):
            if getattr(layer, name, None) is not None:
                found[i, name] = getattr(layer, name)
        for name in ("conv_states", "recurrent_states"):
            found |= {(i, name, k): x for k, x in getattr(layer, name, {}).items() if x is not None}
    return found


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_every_p_follows_every_p(model, kind):
    """The cache is that of a prefill with the new P, and the tokens after it are the same."""
    model_type = model.config.model_type
    if kind == "static" and model_type == "bloom":
        pytest.skip("transformers' own Bloom takes no static cache")
    slow = model_type == "qwen3_next"
    for new, (before, after) in itertools.product(
        (5,) if slow else (1, 5), PAIRS[:: 3 if slow else 1]
    ):
        output = generate(model, before, PROMPT, new_cache(model, kind), new)
        prefilled = generate(model, after, output.sequences[:, :-1], new_cache(model, kind), 1)
        assert recycle.change_p(model, output, after, MASK) is output
        expected = states(prefilled.past_key_values)
        found = states(output.past_key_values)
        assert found.keys() == expected.keys()
        for name, state in found.items():  # of the sequence without padding, which has no meaning
            torch.testing.assert_close(state[0], expected[name][0], atol=1e-5, rtol=1e-5)
        more = generate(model, after, output.sequences, output.past_key_values)
        anew = generate(model, after, output.sequences, new_cache(model, kind))
        assert torch.equal(more.sequences, anew.sequences)


def bytes_of(cache):
    return sum(x.untyped_storage().nbytes() for x in states(cache).values())


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_streams_that_stay_keep_every_bit_and_the_others_free_their_memory(kind):
    model = stream_model()
    output = generate(model, 4, PROMPT, new_cache(model, kind))
    cache = output.past_key_values
    kept = {name: x[:, :4].clone() for name, x in states(cache).items()}  # of 2 heads each
    length = cache.get_seq_length()
    for p, streams in ((2, 2), (4, 4), (2, 2)):
        recycle.change_p(model, output, p, MASK)
        assert all(torch.equal(states(cache)[x][:, :4], kept[x]) for x in kept)
        room = 32 if kind == "static" else length
        assert bytes_of(cache) == 2 * 2 * (2 * streams * 2 * room * 16 * 4)
        if kind == "static":
            assert [layer.num_heads for layer in cache.layers] == [2 * streams] * 2
    output = generate(model, 4, PROMPT, new_cache(model, kind))
    before = bytes_of(output.past_key_values)
    shrink_cache(output.past_key_values, 2)
    assert bytes_of(output.past_key_values) == before // 2


def test_only_the_missing_streams_run_and_once():
    model = stream_model()
    rows = []
    layer = model.get_base_model().model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(tuple(args[0].shape[:2])))
    output = generate(model, 2, PROMPT)
    for p, expected in ((2, []), (4, [(2 * 2, 13)]), (1, [(2, 13)]), (4, [(4 * 2, 13)]), (2, [])):
        rows.clear()
        recycle.change_p(model, output, p, MASK)
        assert rows == expected
    hook.remove()
    assert recycle.get_p(model) == 4  # as before


def test_several_sequences_for_a_prompt_and_a_mask_of_all_tokens():
    model = stream_model()
    options = OPTIONS | {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5}
    with recycle.use_p(model, 4):
        output = model.generate(PROMPT, attention_mask=MASK, **options)
    whole = F.pad(MASK.repeat_interleave(3, dim=0), (0, 5), value=1)
    other = copy.deepcopy(output)
    recycle.change_p(model, output, 1, MASK)
    recycle.change_p(model, other, 1, whole)
    for name, state in states(output.past_key_values).items():
        assert torch.equal(state, states(other.past_key_values)[name])
    with recycle.use_p(model, 1):
        found = logits(
            model,
            output.sequences[:, -1:],
            past_key_values=output.past_key_values,
            attention_mask=whole,
            position_ids=whole.sum(1, keepdim=True) - 1,
        )
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        expected = logits(model, output.sequences, attention_mask=whole, position_ids=positions)
    torch.testing.assert_close(found[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="an older transformers fails there of itself",
)
def test_windows_that_can_go_back_are_computed_anew():
    """They hold more than a prefill would leave in them."""
    model = stream_model(tiny_model("mistral", sliding_window=6, head_dim=16))
    cache = new_cache(model, "dynamic")
    for layer in cache.layers:
        layer.activate_past_recording()
    output = generate(model, 2, PROMPT, cache)
    assert cache.layers[0].keys.shape[2] > 6
    recycle.change_p(model, output, 4, MASK)
    more = generate(model, 4, output.sequences, cache)
    assert torch.equal(more.sequences, generate(model, 4, output.sequences).sequences)


def test_what_cannot_change():
    model = stream_model()
    output = generate(model, 2, PROMPT)
    with pytest.raises(recycle.errors.RecycleError, match="got p=3"):
        recycle.change_p(model, output, 3)
    with pytest.raises(CacheError, match=r"got a tensor.*with return_dict_in_generate=True"):
        recycle.change_p(model, output.sequences, 4)
    short = copy.copy(output)
    short.sequences = output.sequences[:, :10]
    with pytest.raises(CacheError, match=r"1 to 10 tokens.*got 13\. Generate with use_cache=True"):
        recycle.change_p(model, short, 4)
    short.past_key_values = None
    with pytest.raises(CacheError, match="got none"):
        recycle.change_p(model, short, 4)
    for beams in (2, 3):
        options = OPTIONS | {"num_beams": beams, "num_return_sequences": 2}
        with pytest.raises(CacheError, match="cannot change after beam search"):
            recycle.change_p(model, model.generate(PROMPT, **options), 2)
    output.past_key_values.__class__ = type("OtherCache", (DynamicCache,), {})
    with pytest.raises(CacheError, match="DynamicCache or StaticCache, got OtherCache"):
        recycle.change_p(model, output, 1)
