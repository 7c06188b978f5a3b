"""Replication, aggregation, one cache for all streams, and which streams a forward pass uses.

Everything is float32. Equality up to rounding is 1e-4 on logits of size 10.
"""

import copy
import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache

from recycle.family import FamilyError
from recycle.family.switch import get_p, set_p, use_p
from recycle.parscale import ActiveStreams, CacheError, choose_streams, shrink_cache
from recycle.parscale.active import this_thread
from recycle.parscale.prefix import StreamPrefix
from tests.adapters import logits, scramble, stream_config, stream_model, token_ids
from tests.tiny import tiny_model

TYPES = ["qwen2", "llama", "gpt2"]
ATTENTION = ["eager", "sdpa"]
MANY_P = [1, 2, 4]


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.fixture(scope="module", params=TYPES)
def model(request):
    return stream_model(request.param)


@pytest.fixture(scope="module", params=TYPES)
def each_attention(request):
    """The same model under both attention functions."""
    return {
        name: stream_model(tiny_model(request.param, attn_implementation=name))
        for name in ATTENTION
    }


def generate(model, ids, **options):
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(input_ids=ids, **options)


# --- which streams ----------------------------------------------------------------------------


def test_every_p_gives_other_logits(model):
    ids = token_ids(2, 9)
    outputs = []
    for p in MANY_P:
        set_p(model, p)
        assert get_p(model) == p
        outputs.append(logits(model, ids))
    assert (outputs[0] - outputs[1]).abs().max() > 0.1
    assert (outputs[1] - outputs[2]).abs().max() > 0.1


def test_switching_there_and_back_changes_no_bit(model):
    ids = token_ids(2, 9)
    set_p(model, 4)
    before, tokens = logits(model, ids), generate(model, ids)
    for p in (2, 1, 4):
        set_p(model, p)
        logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(generate(model, ids), tokens)


def in_threads(model, ids, run):
    """Which P gave other logits than alone, when one thread for each runs through `run`."""
    expected, wrong = {}, []
    for p in MANY_P:
        set_p(model, p)
        expected[p] = logits(model, ids)
    set_p(model, 4)
    together = threading.Barrier(len(MANY_P))

    def work(p):
        together.wait()
        with use_p(model, p):
            for _ in range(15):
                if (logits(run, ids) - expected[p]).abs().max() > 1e-4:
                    wrong.append(p)

    threads = [threading.Thread(target=work, args=(p,)) for p in MANY_P]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_threads_use_different_p(model):
    assert in_threads(model, token_ids(2, 9), run=model) == []
    assert get_p(model) == 4


def test_use_p_of_two_models_do_not_hide_each_other():
    first, second = stream_model("qwen2"), stream_model("llama")
    with use_p(first, 2):
        with use_p(second, 1):
            assert (get_p(first), get_p(second)) == (2, 1)
            with use_p(first, 1):
                assert (get_p(first), get_p(second)) == (1, 1)
        assert (get_p(first), get_p(second)) == (2, 4)
    assert (get_p(first), get_p(second)) == (4, 4)


def test_use_p_that_ends_out_of_order_leaves_nothing_behind(model):
    """As two tasks of one thread do."""
    set_p(model, 4)
    outer, inner = use_p(model, 2), use_p(model, 1)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert get_p(model) == 1
    inner.__exit__(None, None, None)
    assert get_p(model) == 4
    set_p(model, 2)
    assert get_p(model) == 2


def test_use_p_ends_with_an_exception(model):
    set_p(model, 4)
    with pytest.raises(RuntimeError), use_p(model, 2):
        raise RuntimeError
    assert get_p(model) == 4


def test_an_exception_in_the_decoder_leaves_no_streams_behind(model):
    ids = token_ids(2, 9)
    set_p(model, 4)
    expected = logits(model, ids)
    layer = model.get_decoder().get_submodule(
        "h" if hasattr(model.get_decoder(), "h") else "layers"
    )
    hook = layer[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, ids)
    hook.remove()
    assert this_thread.forward.active is None
    bare = tiny_model(model.config.model_type)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(bare, ids))
    assert torch.equal(logits(model, ids), expected)


def test_a_deep_copy_is_a_model_of_its_own(model):
    ids = token_ids(2, 9)
    set_p(model, 4)
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), expected)
    set_p(twin, 2)
    scramble(twin)
    assert not torch.equal(logits(twin, ids), expected)
    assert get_p(model) == 4
    assert torch.equal(logits(model, ids), expected)


def test_a_cache_belongs_to_the_adapter_that_filled_it(model):
    twin = copy.deepcopy(model)
    twin.add_adapter("control", stream_config((1,)))
    ids = token_ids(2, 9)
    twin.set_adapter("control")
    cache = twin(ids, use_cache=True).past_key_values
    set_p(twin, 1)
    with pytest.raises(CacheError, match="with adapter 'control', but the backbone alone is"):
        twin(token_ids(2, 1), past_key_values=cache)


@pytest.mark.parametrize("p", [2.0, True, "2", 0, -1, None])
def test_p_is_a_whole_number_of_the_family(model, p):
    with pytest.raises(FamilyError, match="offers P = 1, 2, 4, got p="):
        set_p(model, p)


# --- padding ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("p", [2, 4])
def test_positions_do_not_count_left_padding(model, p):
    set_p(model, p)
    ids = token_ids(1, 6)
    expected = logits(model, ids)
    padded = torch.cat([token_ids(1, 3, seed=5), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    first = model(padded, attention_mask=mask, use_cache=True)
    close(first.logits[:, 3:], expected)
    more = token_ids(1, 2, seed=6)
    output = model(
        more,
        attention_mask=torch.cat([mask, torch.ones(1, 2, dtype=torch.long)], dim=1),
        past_key_values=first.past_key_values,
    )
    close(output.logits, logits(model, torch.cat([ids, more], dim=1))[:, 6:])


# --- hybrids ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_hybrid_of_attention_and_convolution():
    """Its cache has layers without keys, which belong to the streams all the same."""
    bare = tiny_model("lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3)
    ids = token_ids(2, 9)
    expected = logits(bare, ids)
    model = stream_model(bare)
    for p in (1, 2, 4):
        set_p(model, p)
        whole = logits(model, ids, use_cache=False)
        assert torch.equal(whole, expected) == (p == 1)
        first = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=first.past_key_values)
        close(torch.cat([first.logits, rest.logits], dim=1), whole)
    with pytest.raises(CacheError, match="plain keys and values, got LinearAttentionLayer"):
        shrink_cache(first.past_key_values, 2)


# --- cache ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("p", MANY_P)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", ["dynamic", "static", "given"])
def test_pieces_through_a_cache_equal_one_pass(each_attention, attention, p, kind):
    model = each_attention[attention]
    set_p(model, p)
    ids = token_ids(2, 14)
    expected = logits(model, ids, use_cache=False)
    cache = None
    if kind == "given":
        cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=20)
    pieces = []
    for piece in ids.split([5, 1, 4, 4], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    close(torch.cat(pieces, dim=1), expected)
    assert cache.get_seq_length() == 14
    assert cache.layers[0].keys.shape[0] == 2
    assert cache.layers[0].keys.shape[1] == p * model.config.num_attention_heads // (
        1 if model.config.model_type == "gpt2" else 2
    )


@torch.no_grad()
@pytest.mark.parametrize("p", MANY_P)
def test_a_cropped_cache_goes_on(model, p):
    set_p(model, p)
    ids, others = token_ids(2, 12), token_ids(2, 5, seed=9)
    cache = model(torch.cat([ids[:, :8], others], dim=1), use_cache=True).past_key_values
    cache.crop(-5)
    close(model(ids[:, 8:], past_key_values=cache).logits, logits(model, ids)[:, 8:])


@pytest.mark.parametrize("p", MANY_P)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_cached_generation_equals_uncached(model, p, options):
    set_p(model, p)
    ids = token_ids(2, 7)
    expected = generate(model, ids, use_cache=False, **options)
    assert torch.equal(generate(model, ids, **options), expected)
    static = generate(model, ids, cache_implementation="static", **options)
    assert torch.equal(static, expected)


def test_left_padding_changes_no_token(model):
    set_p(model, 4)
    ids = token_ids(1, 7)
    padded = torch.cat([torch.full((1, 4), 2), ids], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    both = torch.cat([padded, token_ids(1, 11, seed=5)])
    masks = torch.cat([mask, torch.ones_like(mask)])
    expected = generate(model, ids)[:, 7:]
    assert torch.equal(generate(model, both, attention_mask=masks)[:1, 11:], expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_shrunk_cache_equals_the_smaller_p(model, kind):
    ids, more = token_ids(2, 8), token_ids(2, 3, seed=4)

    def new_cache():
        if kind == "static":
            return StaticCache(config=model.config, max_cache_len=16)
        return DynamicCache(config=model.config)

    caches = {}
    for p in (4, 2):
        set_p(model, p)
        caches[p] = model(ids, past_key_values=new_cache()).past_key_values
    shrink_cache(caches[4], 2)
    for ours, theirs in zip(caches[4].layers, caches[2].layers, strict=True):
        close(ours.keys, theirs.keys)
        close(ours.values, theirs.values)
    expected = model(more, past_key_values=caches[2]).logits
    close(model(more, past_key_values=caches[4]).logits, expected)


def test_shrinking_in_the_middle_of_a_generation(model):
    ids = token_ids(2, 8)
    set_p(model, 4)
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    cache = first.past_key_values
    shrink_cache(cache, 2)
    set_p(model, 2)
    tokens = generate(model, first.sequences, past_key_values=cache, max_new_tokens=6)
    assert torch.equal(tokens, generate(model, first.sequences, max_new_tokens=6))


@torch.no_grad()
def test_a_cache_of_another_p_is_refused_before_any_compute(model):
    ids = token_ids(2, 5)
    calls = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    for filled in MANY_P:
        for used in MANY_P:
            set_p(model, filled)
            cache = model(ids, use_cache=True).past_key_values
            set_p(model, used)
            calls.clear()
            if filled == used:
                model(ids[:, :1], past_key_values=cache)
                continue
            with pytest.raises(CacheError, match=f"filled with P = {filled}, but P = {used}"):
                model(ids[:, :1], past_key_values=cache)
            assert calls == []
            assert cache.get_seq_length() == 5
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize(("filled", "p"), [(4, 8), (4, 1), (4, 0), (1, 2), (2, 4)])
def test_a_cache_only_shrinks(filled, p):
    model = stream_model()
    set_p(model, filled)
    cache = model(token_ids(1, 4), use_cache=True).past_key_values
    with pytest.raises(CacheError, match=f"own number of {filled}, got p={p}"):
        shrink_cache(cache, p)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_sliding_windows_and_their_caches(model_type):
    sizes = {"sliding_window": 6, "head_dim": 16}
    if model_type == "gemma3_text":
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    model = stream_model(tiny_model(model_type, **sizes))
    ids = token_ids(2, 14)
    expected = logits(model, ids, use_cache=False)
    for cache in (None, StaticCache(config=model.config, max_cache_len=20)):
        pieces = []
        for piece in ids.split([5, 1, 4, 4], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
        close(torch.cat(pieces, dim=1), expected)
    tokens = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), tokens)
    assert torch.equal(generate(model, ids, cache_implementation="static"), tokens)


def test_a_kept_cache_over_two_turns(model):
    set_p(model, 4)
    first = generate(model, token_ids(2, 7), return_dict_in_generate=True)
    ids = torch.cat([first.sequences, token_ids(2, 5, seed=8)], dim=1)
    cache = copy.deepcopy(first.past_key_values)
    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, past_key_values=cache), expected)


# --- inputs and outputs -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 1), (4, 4), (2, 2), (8, 4)])
@pytest.mark.parametrize("p", [2, 4])
def test_each_sequence_is_independent_of_the_batch(model, shape, p):
    set_p(model, p)
    ids = token_ids(*shape)
    alone = torch.cat([logits(model, row[None]) for row in ids])
    close(logits(model, ids), alone)


def test_eager_equals_sdpa(each_attention):
    ids, mask = token_ids(2, 9), torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    for p in MANY_P:
        for inputs in ({}, {"attention_mask": mask}):
            outputs = []
            for model in each_attention.values():
                set_p(model, p)
                outputs.append(logits(model, ids, **inputs)[:, 2:])
            close(*outputs)


@torch.no_grad()
def test_the_same_input_in_other_forms(each_attention):
    ids = token_ids(3, 9)
    embeddings = each_attention["sdpa"].get_input_embeddings()(ids)
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(3, 1, 9, 9)
    additive = torch.zeros(3, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
    for name, model in each_attention.items():
        set_p(model, 4)
        expected = logits(model, ids)
        close(model(ids).logits, expected)
        close(logits(model, ids, position_ids=torch.arange(9)[None]), expected)
        close(logits(model, ids, position_ids=torch.arange(9).expand(3, 9)), expected)
        close(logits(model, ids, attention_mask=torch.ones_like(ids)), expected)
        close(logits(model, ids, attention_mask=additive), expected)
        close(logits(model, ids, attention_mask=additive[:1]), expected)
        if name == "sdpa":
            close(logits(model, ids, attention_mask=causal), expected)
        close(model(inputs_embeds=embeddings).logits, expected)
        close(model(ids, return_dict=False)[0], expected)
        close(logits(model, ids, logits_to_keep=2), expected[:, -2:])


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other():
    model = stream_model(tiny_model("llama", attn_implementation="sdpa"))
    first, second = token_ids(1, 6), token_ids(1, 5, seed=2)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    packed = logits(
        model, torch.cat([first, second], dim=1), position_ids=positions, use_cache=False
    )
    alone = torch.cat([logits(model, first), logits(model, second)], dim=1)
    bare = tiny_model("llama", attn_implementation="sdpa")
    bare_packed = logits(
        bare, torch.cat([first, second], dim=1), position_ids=positions, use_cache=False
    )
    close(bare_packed, torch.cat([logits(bare, first), logits(bare, second)], dim=1))
    close(packed, alone)


def test_the_loss_is_that_of_the_logits(model):
    ids = token_ids(3, 9)
    set_p(model, 4)
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    close(output.loss, expected, 1e-5)


@torch.no_grad()
def test_hidden_states_and_attentions():
    model = stream_model(tiny_model("llama", attn_implementation="eager"))
    ids = token_ids(2, 5)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    # What lies between the decoder's ends keeps its streams, batch-major.
    assert [h.shape[0] for h in output.hidden_states] == [8, 8, 2]
    assert output.attentions[0].shape == (8, 4, 5, 6 + 5)
    close(model.lm_head(output.hidden_states[-1]), output.logits, 1e-5)
    as_tuple = model(ids, output_hidden_states=True, return_dict=False, use_cache=False)
    close(as_tuple[1][-1], output.hidden_states[-1], 1e-6)


@torch.no_grad()
def test_several_heads_come_stacked_from_one_pass(model):
    ids = token_ids(2, 7)
    with choose_streams(model, ActiveStreams("default", 4, (2, 4))):
        both = model(ids, use_cache=False).logits
    for p, part in zip((2, 4), both.chunk(2), strict=True):
        set_p(model, p)
        close(part, logits(model, ids))


def test_sampling_takes_one_draw_for_all_streams(model):
    ids = token_ids(2, 7)
    set_p(model, 4)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outputs.append(
            generate(model, ids, do_sample=True, num_return_sequences=3, use_cache=use_cache)
        )
    assert outputs[0].shape == (6, 17)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_assisted_and_prompt_lookup_decoding_give_the_same_tokens(model_type):
    model, assistant = stream_model(model_type), tiny_model(model_type, seed=1)
    ids = token_ids(1, 4).repeat(1, 4)
    for p in (2, 4):
        set_p(model, p)
        expected = generate(model, ids, max_new_tokens=16)
        for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
            assert torch.equal(generate(model, ids, max_new_tokens=16, **options), expected)


def test_attention_without_support_is_refused():
    model = stream_model()
    model.get_decoder().config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation sdpa or eager, got 'flex_attention'"):
        model(token_ids(1, 4))


# --- training ---------------------------------------------------------------------------------


def gradients(model, ids, p=None):
    model.zero_grad()
    if p is None:
        loss = model(ids, labels=ids, use_cache=False).loss
    else:  # the backward pass runs outside
        with use_p(model, p):
            loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [None, 2])
def test_gradient_checkpointing_gives_the_same_gradients(model, reentrant, p):
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    set_p(model, 4)
    ids = token_ids(2, 9)
    expected = gradients(model, ids, p)
    assert len(expected) == 2 * 2 + 4
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    runs = []
    attention = next(m for m in model.modules() if StreamPrefix.child_name in m._modules)
    hook = attention.register_forward_hook(lambda *_: runs.append(1))
    actual = gradients(model, ids, p)
    hook.remove()
    assert len(runs) == 2  # forward and recomputation
    assert actual.keys() == expected.keys()
    for name in expected:
        close(actual[name], expected[name], 1e-6)


def test_gradients_of_a_smaller_p_leave_the_other_streams_alone(model):
    model = copy.deepcopy(model)
    set_p(model, 2)
    for name, gradient in gradients(model, token_ids(2, 9)).items():
        if "parscale_keys" in name or "parscale_values" in name:
            assert gradient[2:].count_nonzero() == 0
            assert gradient[:2].abs().amax(dim=(1, 2, 3)).min() > 0
        else:
            assert ".p2_" in name


# --- compilation ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # qwen2 is among the golden tests
def test_compiled_equals_eager(model_type):
    torch._dynamo.reset()
    model = stream_model(model_type)
    ids = token_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(ids).logits, logits(model, ids), 1e-5)


@torch.no_grad()
def test_compiled_follows_the_switch():
    torch._dynamo.reset()
    model = stream_model(tiny_model("qwen2", num_hidden_layers=1))
    ids = token_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for p in (4, 1, 2, 4):
        set_p(model, p)
        close(compiled(ids).logits, logits(model, ids), 1e-5)
    set_p(compiled, 2)
    assert (get_p(compiled), get_p(model)) == (2, 2)
    for p in (4, 1):
        with use_p(model, p):
            close(compiled(ids).logits, logits(model, ids), 1e-5)
    close(compiled(ids).logits, logits(model, ids), 1e-5)
    assert in_threads(model, ids, run=compiled) == []


def test_compiled_gradients_equal_eager():
    torch._dynamo.reset()
    model = stream_model("qwen2").train()
    ids = token_ids(2, 9)
    expected = gradients(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = gradients(compiled, ids)
    for name in expected:
        close(actual[f"_orig_mod.{name}"], expected[name], 1e-5)


@torch.no_grad()
def test_compiled_decoding_with_a_static_cache():
    torch._dynamo.reset()
    model = stream_model("llama")
    ids = token_ids(2, 8)
    expected = logits(model, ids)
    cache = StaticCache(config=model.config, max_cache_len=16)
    pieces = [model(ids[:, :5], past_key_values=cache).logits]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for piece in ids[:, 5:].split(1, dim=1):
        pieces.append(compiled(piece, past_key_values=cache).logits)
    close(torch.cat(pieces, dim=1), expected)


# --- two models -------------------------------------------------------------------------------


def test_two_models_alive_at_once_do_not_meet():
    first = stream_model("qwen2")
    ids = token_ids(2, 9)
    expected = logits(first, ids)
    second = stream_model(tiny_model("llama"), p_values=(8,), init="random", num_virtual_tokens=3)
    bare = tiny_model("llama", seed=4)
    bare_expected = logits(tiny_model("llama", seed=4), ids)
    logits(second, ids)
    assert torch.equal(logits(first, ids), expected)
    assert torch.equal(logits(bare, ids), bare_expected)
