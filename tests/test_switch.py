"""Choosing P costs nothing, and what is on the model can be pickled and copied."""

import copy
import gc
import io
import statistics
import time
import tracemalloc
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from recycle.family import FamilyError
from recycle.family.switch import available_p, get_p, set_p, use_p
from recycle.parscale import CacheError, streams_of
from recycle.parscale.layer import StreamLayer, adapter_parameters, cut_state, nest_states
from tests.adapters import logits, scramble, stream_config, stream_model, token_ids
from tests.tiny import tiny_model

IDS = token_ids(2, 12)


def three_adapters(layers: int) -> PeftModel:
    model = get_peft_model(tiny_model(num_hidden_layers=layers), stream_config((2, 4)), "nested")
    model.add_adapter("p8", stream_config((8,)))
    model.add_adapter("control", stream_config((1,)))
    scramble(model)
    return model.eval()


def test_choosing_p_takes_no_time_on_a_deep_model():
    """Under 0.1 ms at 36 layers with three adapters, as at two layers: no module is walked."""
    medians = {}
    for layers in (2, 36):
        model = three_adapters(layers)
        for compiled in (False, True):
            wrapped = torch.compile(model) if compiled else model
            seconds = []
            for turn in range(300):
                p = (2, 8, 1, 4)[turn % 4]
                started = time.perf_counter()
                set_p(wrapped, p)
                seconds.append(time.perf_counter() - started)
                assert get_p(model) == p
                started = time.perf_counter()
                with use_p(wrapped, p):
                    seconds.append(time.perf_counter() - started)
            medians[layers, compiled] = statistics.median(seconds)
    assert max(medians.values()) < 1e-4, medians
    assert medians[36, False] < 3 * medians[2, False]


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


def test_choosing_p_allocates_nothing():
    """No operation of torch runs, and no memory is held afterwards."""
    model = three_adapters(36)

    def choose(times):
        for turn in range(times):
            set_p(model, (2, 8, 1, 4)[turn % 4])
            with use_p(model, 2), use_p(model, 1):
                pass

    choose(8)
    with Operations() as operations:
        choose(100)
        assert operations.count == 0
        torch.zeros(1)
        assert operations.count > 0
    tracemalloc.start()
    held = []
    for times in (8, 1000):
        choose(times)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] - held[0] < 1000  # bytes: less than one for each turn


@torch.no_grad()
def test_a_p_is_compiled_once():
    torch._dynamo.reset()
    model = stream_model(tiny_model("qwen2", num_hidden_layers=1))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def run(p, *blocks):
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(use_p(model, block))
            torch.testing.assert_close(compiled(IDS).logits, logits(model, IDS))
            assert get_p(model) == p

    for _ in range(2):
        for p in (4, 2, 1):
            set_p(model, p)
            run(p)
        assert len(graphs) == 3
    for number, around in enumerate([(), (), (1,), (4, 2)]):  # blocks of any depth share theirs
        for p in (4, 2, 1):
            set_p(model, (1, 4)[number % 2])
            run(p, *around, p)
        assert len(graphs) == 6


def test_all_layers_say_what_was_chosen():
    model = three_adapters(3)
    layers = [layer for layer in model.modules() if isinstance(layer, StreamLayer)]
    assert len(layers) == 4
    for p, adapter in ((8, "p8"), (2, "nested"), (4, "nested")):
        set_p(model, p)
        assert model.active_adapter == adapter
        assert model.base_model.active_adapter == adapter
        assert {tuple(layer.active_adapters) for layer in layers} == {(adapter,)}
        assert {layer.disable_adapters for layer in layers} == {False}
        assert model.get_model_status().active_adapters == [adapter]
    set_p(model, 1)
    assert {layer.disable_adapters for layer in layers} == {True}
    assert model.get_model_status().enabled is False
    model.set_adapter("control")
    assert {layer.disable_adapters for layer in layers} == {False}
    with model.disable_adapter():
        assert get_p(model) == 1


def test_an_adapter_of_one_stream_is_chosen_by_name():
    model = three_adapters(2)
    with pytest.raises(FamilyError, match=r"P = 1, 2, 4, 8, got p='control'\. Use model\.set_ad"):
        set_p(model, "control")
    with pytest.raises(FamilyError, match=r"got p=3\. Adapters of one stream .*: \['control'\]"):
        set_p(model, 3)
    model.set_adapter("control")
    with pytest.raises(FamilyError, match="Adapter 'control' is active"):
        get_p(model)


def test_deleting_the_active_adapter_leaves_the_next_one_trainable_everywhere():
    model = three_adapters(3)
    model.set_adapter("nested")
    with pytest.warns(UserWarning, match="Setting active adapter to"):
        model.delete_adapter("nested")
    active = model.active_adapter
    parameters = [x.parameter for x in adapter_parameters(model, active)]
    assert parameters
    assert all(parameter.requires_grad for parameter in parameters)
    assert 4 not in available_p(model)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "bloom", "falcon", "gptj"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_with_streams_can_be_pickled_and_copied(model_type, checkpointing):
    sizes = {"rotary_dim": 8} if model_type == "gptj" else {}
    model = stream_model(tiny_model(model_type, **sizes))
    copies = []
    if checkpointing:  # for which transformers keeps a local function, that cannot be pickled
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.eval()
    if not checkpointing:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
    copies.append(copy.deepcopy(model))
    for other in copies:
        for p in (4, 2, 1):
            set_p(other, p)
            set_p(model, p)
            assert torch.equal(logits(other, IDS), logits(model, IDS))
        set_p(other, 2)
        set_p(model, 4)
        assert (get_p(other), get_p(model)) == (2, 4)  # each has a selection of its own
        layers = [layer for layer in other.modules() if isinstance(layer, StreamLayer)]
        assert {id(layer.selection) for layer in layers} == {id(streams_of(other).selection)}


def test_kinds_of_parameters():
    model = three_adapters(2)
    found = adapter_parameters(model, "nested")
    named = dict(model.named_parameters())
    assert all(named[x.name] is x.parameter for x in found)
    groups = [x.group for x in found]
    assert (groups.count("prefix"), groups.count("aggregator")) == (2 * 2, 2 * 4)
    assert [x.group for x in adapter_parameters(model, "control")] == ["prefix"] * 4


def test_a_nested_adapter_is_cut_and_put_together_again():
    state = {
        "base_model.model.model.layers.0.self_attn.stream_prefix.parscale_keys": torch.rand(4, 2),
        "base_model.model.model.layers.0.self_attn.stream_prefix.parscale_values": torch.rand(4, 2),
        "base_model.model.model.streams.parscale_aggregator.p2_hidden_weight": torch.rand(3),
        "base_model.model.model.streams.parscale_aggregator.p4_hidden_weight": torch.rand(5),
    }
    keys, values, two, four = state
    cut = {p: cut_state(state, p) for p in (2, 4)}
    assert set(cut[2]) == {keys, values, two}
    assert set(cut[4]) == {keys, values, four}
    assert torch.equal(cut[2][keys], state[keys][:2])
    again = nest_states(cut)
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


# ---- caches that exist before the streams run


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_static_cache_that_is_allocated_first(model_type, p):
    """As in a prefill by chunks, for which transformers allocates the backbone's heads."""
    model = stream_model(tiny_model(model_type, attn_implementation="eager"))
    set_p(model, p)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(IDS, **options, disable_compile=True)
    found = model.generate(IDS, **options, disable_compile=True, prefill_chunk_size=5)
    assert torch.equal(found, expected)
    assert torch.equal(expected, model.generate(IDS, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "lfm2", "qwen3_next"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_emptied_cache_serves_another_p(model_type, kind):
    from transformers import DynamicCache

    layers = ["linear_attention", "full_attention"]
    sizes = {"layer_types": layers} if model_type == "qwen3_next" else {}
    model = stream_model(tiny_model(model_type, attn_implementation="eager", **sizes))
    config = model.get_base_model().config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, 32)
    for p in (4, 1, 2, 4):
        set_p(model, p)
        expected = logits(model, IDS)
        torch.testing.assert_close(logits(model, IDS, past_key_values=cache), expected)
        set_p(model, 2 if p != 2 else 4)
        with pytest.raises(CacheError, match="The cache was filled with P ="):
            logits(model, IDS[:, :1], past_key_values=cache)
        cache.reset()
        lengths = [getattr(layer, "get_seq_length", int)() for layer in cache.layers]
        if any(int(length) for length in lengths):  # older transformers empties only some layers
            return


def test_a_cropped_cache_serves_another_p():
    from transformers import DynamicCache

    model = stream_model()
    cache = DynamicCache()
    for p in (4, 2, 1, 4):
        set_p(model, p)
        found = logits(model, IDS, past_key_values=cache)
        torch.testing.assert_close(found, logits(model, IDS))
        cache.crop(-IDS.shape[1])
        assert cache.get_seq_length() == 0


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.v_head = nn.Linear(2, 2)
        self.inner = inner


@pytest.mark.parametrize(
    "wrap", [Wrapper, nn.DataParallel, partial(torch.compile, backend="eager")]
)
@pytest.mark.parametrize("model_type", ["qwen2", "modernbert-decoder"])
def test_a_wrapped_model_is_one_and_the_same(wrap, model_type):
    """PEFT activates what it noted whenever an adapter is added, so its note must follow."""
    model = stream_model(model_type, p_values=(2,), adapter_name="p2")
    model.add_adapter("p4", stream_config((4,)))
    wrapped = wrap(model)
    set_p(wrapped, 4)
    assert model.active_adapter == model.base_model.active_adapter == "p4"
    model.add_adapter("p8", stream_config((8,)))
    assert get_p(wrapped) == get_p(model) == 4


@torch.no_grad()
def test_a_compiled_pass_never_drops_what_another_model_wrote():
    bare, model, ids = tiny_model(), stream_model(), token_ids(2, 9)
    compiled = torch.compile(model, backend="eager")
    for filled in (True, False):
        torch._dynamo.reset()
        cache = StaticCache(config=bare.config, max_cache_len=20)
        if filled:
            bare(ids, past_key_values=cache)
            before = cache.layers[0].keys.clone()
            with pytest.raises(CacheError, match="filled with P = 1, but P = 4 is in use"):
                compiled(ids[:, :2], past_key_values=cache)
            assert torch.equal(cache.layers[0].keys, before)
        else:  # allocated before its first use
            cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
            actual = compiled(ids, past_key_values=cache).logits
            torch.testing.assert_close(actual, model(ids).logits, atol=1e-4, rtol=0)


def test_unloading_gives_the_checkpoint_functions_back():
    model = stream_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    given = model.get_decoder()._gradient_checkpointing_func
    model(token_ids(2, 9), labels=token_ids(2, 9), use_cache=False).loss.backward()
    assert model.get_decoder()._gradient_checkpointing_func is not given
    assert model.unload().get_decoder()._gradient_checkpointing_func is given
