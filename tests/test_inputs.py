"""Every way in which a model is called, on families that differ in positions, masks and caches.

Everything is float32. Equality up to rounding is 1e-4 on logits of size 10, and tokens
are equal unless the two best logits are closer than that.
"""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, EncoderDecoderCache, StaticCache

from recycle.family.switch import set_p, use_p
from recycle.parscale import ActiveStreams, CacheError, choose_streams, shrink_cache
from tests.adapters import logits, stream_model, token_ids
from tests.families.checks import same_tokens
from tests.families.checks import stream_model as family_streams
from tests.families.configs import family_model
from tests.tiny import tiny_model

MANY_P = [1, 2, 4]
SLIDING = {"sliding_window": 6, "head_dim": 16}
BACKBONES = {
    "rotary": lambda: tiny_model("qwen2"),
    "absolute positions": lambda: tiny_model("gpt2"),
    "sliding window": lambda: tiny_model("mistral", **SLIDING),
    "convolutions": lambda: family_model("lfm2", vocab_size=384),
    "by hand, ALiBi": lambda: family_model("bloom", vocab_size=384),
    "by hand, rotary": lambda: family_model("falcon", vocab_size=384),
}


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.fixture(scope="module", params=BACKBONES)
def model(request):
    return stream_model(BACKBONES[request.param]())


@pytest.fixture(params=MANY_P)
def p(request):
    return request.param


def generate(model, ids, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **options}
    # Where none is given, generate hides tokens that happen to be the padding token.
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(input_ids=ids, **options)


def counted(model):
    """Calls of the model's embedding from now on: none is no compute."""
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    return calls


# --- P = 1 ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", BACKBONES)
def test_one_stream_is_the_backbone_bit_for_bit_on_every_path(kind):
    # Frozen as the other one is: by that torch chooses how it multiplies a part of a tensor.
    bare, model = BACKBONES[kind]().requires_grad_(False), stream_model(BACKBONES[kind]())
    logits(model, token_ids(2, 12))  # with streams, whose hooks stay
    set_p(model, 1)
    ids, mask = token_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    causal = torch.ones(12, 12).tril()[None, None].expand(2, 1, 12, 12)
    passes = [
        {},
        {"use_cache": False},
        {"attention_mask": mask},
        {"output_hidden_states": True},
        {"labels": ids},
        {"logits_to_keep": 3},
    ]
    if takes_positions(model):
        passes.append({"position_ids": torch.arange(6).repeat(2, 2), "use_cache": False})
    if not kind.startswith("by hand"):
        additive = (1 - causal) * torch.finfo(torch.float32).min
        passes.append({"attention_mask": additive, "use_cache": False})
    for inputs in passes:
        actual, expected = (x(input_ids=ids, **inputs) for x in (model, bare))
        assert torch.equal(actual.logits, expected.logits)
        if "labels" in inputs:
            assert torch.equal(actual.loss, expected.loss)
        if "output_hidden_states" in inputs:
            assert all(map(torch.equal, actual.hidden_states, expected.hidden_states))
    for options in (
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"attention_mask": mask},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        tokens = []
        for each in (model, bare):
            torch.manual_seed(2)
            tokens.append(generate(each, ids, **options))
        assert torch.equal(*tokens)


# --- caches over several turns ----------------------------------------------------------------


@torch.no_grad()
def test_several_tokens_meet_a_warm_cache(model, p):
    set_p(model, p)
    ids = token_ids(2, 17)
    cache, pieces, seen = None, [], 0
    for piece in ids.split([5, 4, 1, 7], dim=1):
        seen += piece.shape[1]
        positions = torch.arange(seen - piece.shape[1], seen).expand(2, -1)
        inputs = {"position_ids": positions} if takes_positions(model) else {}
        output = model(piece, past_key_values=cache, use_cache=True, **inputs)
        cache = output.past_key_values
        pieces.append(output.logits)
    close(torch.cat(pieces, dim=1), logits(model, ids, use_cache=False))


def takes_positions(model):
    return "position_ids" in model.get_base_model().forward.__code__.co_varnames


def test_three_turns_of_a_conversation(model, p):
    set_p(model, p)
    ids, cache = token_ids(2, 6), None
    for turn in range(3):
        expected = generate(model, ids, use_cache=False)
        output = generate(model, ids, past_key_values=cache, return_dict_in_generate=True)
        same_tokens(model, output.sequences, expected)
        cache = output.past_key_values
        ids = torch.cat([output.sequences, token_ids(2, 5, seed=20 + turn)], dim=1)


def test_drafts_change_no_token(model, p):
    """The same weights at P = 1 draft for P streams; a cache is filled by pieces, and cropped."""
    set_p(model, p)
    ids = token_ids(1, 4).repeat(1, 4)
    expected = generate(model, ids)
    draft = copy.copy(model.get_base_model())
    drafted, forward = [], draft.forward

    def at_one(*args, **kwargs):
        drafted.append(1)
        with use_p(model, 1):
            return forward(*args, **kwargs)

    draft.forward = at_one
    for options in (
        {"assistant_model": draft},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
    ):
        same_tokens(model, generate(model, ids, **options), expected)
    assert len(drafted) > 1


def test_turns_of_a_padded_batch(p):
    """The mask grows from turn to turn, and its padding stays on the left of the first."""
    model = stream_model("qwen2")
    set_p(model, p)
    first = token_ids(1, 5)
    ids = torch.cat([torch.cat([torch.full((1, 3), 2), first], dim=1), token_ids(1, 8, seed=3)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    more = token_ids(2, 4, seed=9)
    output = generate(model, ids, attention_mask=mask, return_dict_in_generate=True)
    ids = torch.cat([output.sequences, more], dim=1)
    mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
    actual = generate(model, ids, attention_mask=mask, past_key_values=output.past_key_values)
    alone = generate(model, torch.cat([generate(model, first), more[:1]], dim=1))
    assert torch.equal(actual[:1, 3:], alone)


@torch.no_grad()
def test_a_cropped_cache_goes_on_with_fewer_streams():
    model = stream_model("llama")
    ids, more = token_ids(2, 10), token_ids(2, 3, seed=5)
    set_p(model, 4)
    cache = model(torch.cat([ids, more], dim=1), use_cache=True).past_key_values
    cache.crop(-3)
    shrink_cache(cache, 2)
    set_p(model, 2)
    expected = model(ids, use_cache=True).past_key_values
    actual = model(more, past_key_values=cache).logits
    close(actual, model(more, past_key_values=expected).logits)


@torch.no_grad()
def test_a_cache_that_is_none_of_transformers_is_refused():
    model = stream_model("llama")
    calls = counted(model)
    for cache in (EncoderDecoderCache(DynamicCache(), DynamicCache()), ((), ())):
        with pytest.raises(CacheError, match=f"got a {type(cache).__name__}"):
            model(token_ids(2, 5), past_key_values=cache)
    assert calls == []


# --- lengths ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_sequences(model, p, length):
    set_p(model, p)
    ids = token_ids(2, length)
    longer = torch.cat([ids, token_ids(2, 4, seed=6)], dim=1)
    close(logits(model, ids), logits(model, longer)[:, :length])  # causal
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_eight_thousand_tokens(model_type):
    length = {"llama": "max_position_embeddings", "gpt2": "n_positions"}[model_type]
    layers = {"llama": "num_hidden_layers", "gpt2": "n_layer"}[model_type]
    backbone = tiny_model(model_type, **{length: 8192, layers: 1})
    model = stream_model(backbone, p_values=(2,))
    ids = token_ids(1, 8192)
    expected = logits(model, ids, use_cache=False)
    output = model(ids[:, :8000], use_cache=True)
    close(output.logits, expected[:, :8000])
    close(model(ids[:, 8000:], past_key_values=output.past_key_values).logits, expected[:, 8000:])


# --- packing ----------------------------------------------------------------------------------


def packed(parts):
    """Sequences in one row, with positions and what a collator for flash attention adds."""
    lengths = [part.shape[1] for part in parts]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    flash |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return torch.cat(parts, dim=1), positions, flash


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "mistral", "gemma3_text"])
def test_sequences_in_one_row_do_not_see_each_other(model_type, attention, p):
    sizes = SLIDING if model_type in ("mistral", "gemma3_text") else {}
    if model_type == "gemma3_text":
        sizes = {**sizes, "layer_types": ["sliding_attention", "full_attention"]}
    model = stream_model(tiny_model(model_type, attn_implementation=attention, **sizes))
    set_p(model, p)
    parts = [token_ids(1, length, seed=length) for length in (9, 1, 12)]
    ids, positions, flash = packed(parts)
    expected = torch.cat([logits(model, part) for part in parts], dim=1)
    passes = [
        {"use_cache": False},
        {"use_cache": False, **flash},
    ]  # padding-free batches bring both
    if p > 1:  # the backbone makes a cache where it is not told, and mixes them
        passes += [{}, flash]
    for inputs in passes:
        close(logits(model, ids, position_ids=positions, **inputs), expected)


@torch.no_grad()
def test_a_packed_row_through_a_compiled_graph():
    torch._dynamo.reset()
    model = stream_model("llama")
    parts = [token_ids(1, length, seed=length) for length in (1, 9, 4)]
    ids, positions, _ = packed(parts)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = torch.cat([logits(model, part) for part in parts], dim=1)
    close(compiled(ids, position_ids=positions, use_cache=False).logits, expected)
    close(logits(model, ids, position_ids=positions), expected)


class Waits(TorchDispatchMode):
    """Counts the values that Python asks for, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("model_type", "more"), [("llama", 0), ("lfm2", 1)])
def test_training_with_positions_waits_no_more_than_the_backbone(model_type, more):
    """Only a backbone that mixes packed sequences has to look for them in every pass."""
    ids, positions = token_ids(2, 9) % 128, torch.arange(9).expand(2, -1)
    counts = []
    for model in (family_model(model_type), family_streams(family_model(model_type))):
        for _ in range(2):  # the first pass finds out what the backbone does
            with Waits() as waits:
                loss = model(ids, labels=ids, position_ids=positions, use_cache=False).loss
        assert loss.isfinite()
        counts.append(waits.count)
    assert counts[1] - counts[0] == more


@torch.no_grad()
def test_packed_rows_that_would_mix_are_refused_before_any_compute():
    model = stream_model("llama")
    calls = counted(model)
    ids, positions, flash = packed([token_ids(1, 4), token_ids(1, 3)])
    cache = "where there is a cache. Pass use_cache=False"
    for inputs, message in (
        ({"position_ids": positions, "use_cache": True}, cache),
        ({"position_ids": positions, "past_key_values": DynamicCache()}, cache),
        (flash, "got cu_seq_lens_q with no position_ids"),
        (
            {**flash, "position_ids": positions, "attention_mask": torch.ones_like(ids)},
            "got cu_seq_lens_q with an attention_mask",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **inputs)
    assert calls == []


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["lfm2", "falcon", "opt", "deepseek_v4"])
def test_packed_rows_are_refused_where_the_backbone_itself_mixes_them(model_type):
    """Whether it does is found out by running it: by its states, its mask, its compression."""
    model = family_streams(family_model(model_type)).train()
    parts = [token_ids(1, 9) % 128, token_ids(1, 7, seed=4) % 128]
    ids, positions, _ = packed(parts)
    with pytest.raises(ValueError, match=r"see each other.*Give each sequence a row of its own"):
        model(ids, position_ids=positions, use_cache=False)
    assert all(module.training for module in model.modules())
    bare = family_model(model_type)
    row = logits(bare, ids, position_ids=positions, use_cache=False)
    assert (row - torch.cat([logits(bare, x) for x in parts], dim=1)).abs().max() > 0.1


def test_gradients_of_a_packed_row_are_those_of_its_sequences():
    model = stream_model("llama")
    parts = [token_ids(1, length, seed=length) for length in (7, 5)]
    ids, positions, _ = packed(parts)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    row = model(ids, position_ids=positions, use_cache=False).logits.square().sum()
    alone = sum(model(part, use_cache=False).logits.square().sum() for part in parts)
    for actual, expected in zip(gradients(row), gradients(alone), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-4)


# --- masks and embeddings ---------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_4d_mask_over_a_warm_cache(attention, p):
    """A tree of two branches after a common beginning: each sees the beginning and itself."""
    model = stream_model(tiny_model("llama", attn_implementation=attention))
    set_p(model, p)
    root, left, right = token_ids(1, 6), token_ids(1, 3, seed=2), token_ids(1, 3, seed=3)
    visible = torch.zeros(1, 1, 6, 12, dtype=torch.bool)
    visible[..., :6] = True
    for start in (0, 3):
        visible[..., start : start + 3, 6 + start : 9 + start] = torch.ones(3, 3).tril().bool()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    positions = torch.tensor([[6, 7, 8, 6, 7, 8]])
    branches = torch.cat([left, right], dim=1)
    expected = [logits(model, torch.cat([root, x], dim=1))[:, 6:] for x in (left, right)]
    for given in (mask, visible) if attention == "sdpa" else (mask,):  # eager adds its mask
        actual = logits(
            model,
            branches,
            attention_mask=given,
            position_ids=positions,
            past_key_values=model(root, use_cache=True).past_key_values,
        )
        close(actual, torch.cat(expected, dim=1))


@torch.no_grad()
def test_masks_by_layer_type():
    sizes = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
    model = stream_model(tiny_model("gemma3_text", **sizes))
    ids = token_ids(2, 12)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    masks = {
        "full_attention": causal.expand(2, 1, 12, 12),
        "sliding_attention": causal.triu(-5).expand(2, 1, 12, 12),
    }
    expected = logits(model, ids, use_cache=False)
    close(logits(model, ids, attention_mask=masks, use_cache=False), expected)


def test_generation_from_embeddings(model, p):
    set_p(model, p)
    ids = token_ids(2, 7)
    embeddings = model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    actual = model.generate(inputs_embeds=embeddings, **options)
    assert torch.equal(actual, generate(model, ids)[:, 7:])


@torch.no_grad()
def test_which_logits_are_kept(model, p):
    set_p(model, p)
    ids = token_ids(2, 9)
    expected = logits(model, ids)
    close(logits(model, ids, logits_to_keep=1), expected[:, -1:])
    if model.config.model_type != "gpt2":  # takes numbers only
        chosen = torch.tensor([1, 4, 8])
        close(logits(model, ids, logits_to_keep=chosen), expected[:, chosen])


def test_the_loss_over_given_items(p):
    """As a trainer divides it that accumulates gradients."""
    model = stream_model("llama")
    set_p(model, p)
    ids = token_ids(3, 9)
    mean = model(ids, labels=ids).loss
    items = torch.tensor(3 * 8 * 2)
    close(model(ids, labels=ids, num_items_in_batch=items).loss, mean / 2, 1e-5)


# --- outputs ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_the_balance_of_experts_is_that_of_all_streams(model_type):
    model = family_streams(family_model(model_type))
    ids = token_ids(2, 9) % 128
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    output = model(ids, labels=ids, attention_mask=mask, output_router_logits=True)
    layers = 2
    assert len(output.router_logits) == layers * 2  # of P = 2
    assert {x.shape[0] for x in output.router_logits} == {ids.numel()}
    # Two streams that are alike are balanced as one of them is.
    for name, parameter in model.named_parameters():
        if "parscale_keys" in name or "parscale_values" in name:
            parameter[1] = parameter[0]
    alike = model(ids, labels=ids, attention_mask=mask, output_router_logits=True)
    assert torch.equal(alike.router_logits[0], alike.router_logits[1])
    one = alike.router_logits[::2]
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = model.config.num_local_experts if model_type != "qwen2_moe" else 4
    expected = load_balancing_loss_func(one, experts, model.config.num_experts_per_tok, mask)
    close(alike.aux_loss, expected, 1e-5)


@torch.no_grad()
def test_the_decoder_called_directly(model):
    """Its ends are the backbone's, whether its parts come by name or by number."""
    set_p(model, 4)
    decoder, ids = model.get_base_model().get_decoder(), token_ids(2, 5)
    named = decoder(input_ids=ids, output_hidden_states=True)
    numbered = decoder(input_ids=ids, output_hidden_states=True, return_dict=False)
    for last, cache, hidden in (tuple(named.values()), numbered):
        assert last.shape == (2, 5, model.config.hidden_size)
        assert type(cache) is DynamicCache
        assert [x.shape[0] for x in hidden] == [8] * (len(hidden) - 1) + [2]
        assert torch.equal(hidden[-1], last)
        close(model.get_output_embeddings()(last), logits(model, ids))


@torch.no_grad()
def test_attentions_see_the_prefix_first():
    model = stream_model(tiny_model("llama", attn_implementation="eager"))
    n = model.peft_config["default"].num_virtual_tokens
    attentions = model(token_ids(2, 5), output_attentions=True).attentions
    assert {x.shape for x in attentions} == {(8, 4, 5, n + 5)}
    assert all((x[..., :n] > 0).all() for x in attentions)
    close(attentions[0].sum(dim=-1), torch.ones(8, 4, 5), 1e-5)


# --- gradient checkpointing -------------------------------------------------------------------


def gradients(model, run, p_values=(4,)):
    """Of a loss over the logits of every head; the backward pass runs outside the choice."""
    model.zero_grad()
    with choose_streams(model, ActiveStreams("default", 4, p_values)):
        hidden = run(input_ids=token_ids(2, 9), use_cache=False).logits
    hidden.square().mean().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["rotary", "sliding window", "convolutions", "by hand, rotary"])
def test_nested_heads_under_gradient_checkpointing(kind, reentrant):
    model = stream_model(BACKBONES[kind]()).train()
    expected = gradients(model, model, p_values=(2, 4))
    assert sum(".p2_" in name or ".p4_" in name for name in expected) == 8
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = gradients(model, model, p_values=(2, 4))
    assert actual.keys() == expected.keys()
    for name in expected:
        close(actual[name], expected[name], 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "whole",
    [
        pytest.param(True, id="one graph"),
        pytest.param(False, id="with breaks", marks=pytest.mark.slow),
    ],
)
def test_gradient_checkpointing_under_compile(whole, reentrant):
    """Compiled first and run as it is first: both find the streams when they recompute."""
    model = stream_model(tiny_model("llama", num_hidden_layers=1)).train()
    expected = gradients(model, model)
    for first in ("compiled", "as it is"):
        twin = copy.deepcopy(model)
        twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # The hook that PEFT's models need for it to be reentrant breaks graphs.
        base = twin.get_base_model()
        base.disable_input_require_grads() if whole else base.enable_input_require_grads()
        if not whole:
            attention = base.get_decoder().layers[0].self_attn
            attention.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        if first == "as it is":
            gradients(twin, twin)
        torch._dynamo.reset()
        actual = gradients(twin, torch.compile(twin, fullgraph=whole, backend="aot_eager"))
        assert actual.keys() == expected.keys()
        for name in expected:
            close(actual[name], expected[name], 1e-6)


# --- compilation ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rotary", "absolute positions", "by hand, ALiBi"])
def test_one_compiled_graph_for_every_length(kind):
    torch._dynamo.reset()
    model = stream_model(BACKBONES[kind]())
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for length in (9, 5, 12):
        ids = token_ids(2, length)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        for inputs in ({}, {"attention_mask": mask}):
            actual = compiled(ids, use_cache=False, **inputs).logits
            close(actual, logits(model, ids, use_cache=False, **inputs))


@torch.no_grad()
@pytest.mark.parametrize("where", ["embed_tokens", "layers.0.self_attn"])
def test_a_break_in_the_compiled_graph_loses_no_stream(where):
    torch._dynamo.reset()
    model = stream_model(tiny_model("llama", num_hidden_layers=1))
    ids = token_ids(2, 9)
    expected = logits(model, ids)
    module = model.get_base_model().get_decoder().get_submodule(where)
    module.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    close(torch.compile(model, backend="eager")(ids).logits, expected)


@pytest.mark.parametrize(
    "kind", ["rotary", "absolute positions", "sliding window", "by hand, rotary"]
)
def test_compiled_generation_with_a_static_cache(kind, p, monkeypatch):
    """As transformers itself compiles it on a GPU; the first token is not compiled there either."""
    torch._dynamo.reset()
    model = stream_model(BACKBONES[kind]())
    set_p(model, p)
    causal_lm, ids = model.get_base_model(), token_ids(2, 7)
    monkeypatch.setattr(type(causal_lm), "_valid_auto_compile_criteria", lambda *_: True)
    compiled = []
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *x, **y: compiled.append(y["fullgraph"]) or original(*x, **y)
    )
    actual = generate(
        model,
        ids,
        cache_implementation="static",
        compile_config=CompileConfig(fullgraph=True, backend="eager", mode=None),
    )
    assert compiled == [True]
    assert torch.equal(actual, generate(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_steps_with_a_static_cache_through_aot(backend):
    torch._dynamo.reset()
    model = stream_model("llama")
    ids = token_ids(2, 8)
    expected = logits(model, ids)
    cache = StaticCache(config=model.config, max_cache_len=16)
    pieces = [model(ids[:, :5], past_key_values=cache).logits]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for piece in ids[:, 5:].split(1, dim=1):
        pieces.append(compiled(piece, past_key_values=cache).logits)
    close(torch.cat(pieces, dim=1), expected)


# --- what is refused --------------------------------------------------------------------------


def test_paged_batching_is_refused_but_for_the_backbone():
    model = stream_model("llama")
    calls = counted(model)
    for start in (
        lambda: model.generate_batch(inputs=[[5, 6, 7]], max_new_tokens=2),
        lambda: model.get_base_model().init_continuous_batching(),
        lambda: generate(model, token_ids(1, 4), cache_implementation="paged"),
    ):
        with pytest.raises(ValueError, match=r"paged continuous batching \(generate_batch\)"):
            start()
    assert calls == []
    set_p(model, 1)
    manager = model.get_base_model().init_continuous_batching()  # not started
    assert not manager.is_running()


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_adapter_names_are_refused_before_any_compute(call):
    model = stream_model("llama")
    calls = counted(model)
    with pytest.raises(ValueError, match="takes no adapter_names"):
        getattr(model, call)(input_ids=token_ids(2, 4), adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="adapter_names"):  # generate knows no such argument
        getattr(model.get_base_model(), call)(token_ids(2, 4), adapter_names=["default"] * 2)
    assert calls == []


@pytest.mark.parametrize(
    "attention", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa"]
)
def test_other_attention_is_refused_before_any_compute(attention):
    model = stream_model("llama")
    calls = counted(model)
    ids, positions, flash = packed([token_ids(1, 4), token_ids(1, 3)])
    model.get_decoder().config._attn_implementation = attention
    with pytest.raises(ValueError, match=r"sdpa or eager, got .*attn_implementation='sdpa'"):
        model(ids, position_ids=positions, use_cache=False, **flash)
    assert calls == []
