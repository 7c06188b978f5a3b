"""What `generate` of a loaded family compiles, and that it decodes the same tokens."""

import copy
import io
import threading
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.generation import BaseStreamer

import recycle
from recycle.decode import policy as policies
from recycle.decode.policy import Schedule
from recycle.family.model import FamilyModel, cache_length
from tests.adapters import scramble, stream_config, stream_model, token_ids
from tests.tiny import tiny_model

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def family_model(compiles=None, **sizes) -> FamilyModel:
    model = FamilyModel(tiny_model(**sizes), stream_config((2, 4)))
    scramble(model)
    model.compiles = compiles
    return model.eval()


@pytest.fixture
def graphs(monkeypatch):
    """Graphs compiled so far, by a compiler that runs them as they are."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    config = partial(CompileConfig, backend=backend, mode=None)
    monkeypatch.setattr("recycle.family.model.CompileConfig", config)
    monkeypatch.setattr("transformers.modeling_utils.CompileConfig", config)
    torch._dynamo.reset()
    return found


@pytest.fixture
def accelerator(monkeypatch):
    """Transformers takes the CPU for a device that it compiles for."""
    original = type(tiny_model())._valid_auto_compile_criteria

    def criteria(self, kwargs, config):
        if config.compile_config is None:
            config.compile_config = CompileConfig()
            config.compile_config._compile_all_devices = True
            found = original(self, kwargs, config)
            config.compile_config = None
            return found
        return original(self, kwargs, config)

    monkeypatch.setattr(type(tiny_model()), "_valid_auto_compile_criteria", criteria)


def padded_batch():
    ids = token_ids(2, 7)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 2, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("inputs", [{"input_ids": token_ids(1, 9)}, padded_batch()])
def test_every_token_equals_the_eager_one_and_each_p_compiles_once(graphs, capsys, inputs):
    model, eager = family_model(True), family_model(False)
    rows = len(inputs["input_ids"])
    for turn in range(2):
        for p in (4, 2, 1):
            recycle.set_p(model, p)
            recycle.set_p(eager, p)
            expected = eager.generate(**inputs, **GREEDY)
            assert torch.equal(model.generate(**inputs, **GREEDY), expected)
            with recycle.use_p(model, 4 if p == 1 else 1), recycle.use_p(model, p):
                assert torch.equal(model.generate(**inputs, **GREEDY), expected)
        if turn == 0:
            count = len(graphs)
            said = capsys.readouterr().err
            for p in (4, 2, 1):
                line = f"Compiling a step of P = {p} (batch {rows}, up to 256 tokens) ...\nCompiled"
                assert said.count(line) == 1
    assert count >= 3
    assert len(graphs) == count
    assert capsys.readouterr().err == ""


def test_sampling_draws_the_same_with_and_without_a_warm_up(graphs):
    model, eager = family_model(True), family_model(False)
    ids = token_ids(1, 9)
    sampling = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
    found = []
    for each in (model, model, eager):
        torch.manual_seed(0)
        found.append(each.generate(ids, **sampling))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_settings_may_be_given_as_one_object(graphs):
    model, ids = family_model(True), token_ids(1, 9)
    beams = GenerationConfig(**GREEDY, num_beams=2)
    expected = family_model(False).generate(ids, beams)
    assert torch.equal(model.generate(ids, beams), expected)
    assert graphs == []
    settings = GenerationConfig(**GREEDY)
    expected = family_model(False).generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, generation_config=settings), expected)
    assert len(graphs) > 0
    assert settings.cache_implementation is None


def test_on_a_cpu_nothing_compiles_of_itself(graphs):
    model = family_model()
    assert torch.equal(
        model.generate(token_ids(1, 9), **GREEDY),
        family_model(False).generate(token_ids(1, 9), **GREEDY),
    )
    assert graphs == []


def test_on_an_accelerator_it_does_and_can_be_told_not_to(graphs, accelerator, capsys):
    ids = token_ids(1, 9)
    tokens = family_model().generate(ids, **GREEDY)
    assert len(graphs) > 0
    assert "Compiling a step of P = 4" in capsys.readouterr().err
    count = len(graphs)
    assert torch.equal(family_model(False).generate(ids, **GREEDY), tokens)
    assert len(graphs) == count


def test_a_family_that_a_run_puts_on_its_backbone_compiles_nothing(graphs, accelerator):
    model = FamilyModel(tiny_model(), stream_config((2, 4))).eval()
    model.generate(token_ids(1, 9), **GREEDY)
    assert graphs == []


OTHER_WAYS = {
    "beams": {"num_beams": 2},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "a dynamic cache": {"cache_implementation": "dynamic"},
    "chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_other_ways_of_decoding_are_left_as_they_are(graphs, accelerator, way):
    ids, options = token_ids(1, 9), GREEDY | OTHER_WAYS[way]
    expected = family_model(False).generate(ids, **options)
    assert torch.equal(family_model().generate(ids, **options), expected)
    assert graphs == []


def test_a_cache_of_the_callers_own_goes_on_in_mid_generation(graphs, accelerator):
    ids, model = token_ids(1, 9), family_model()
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, past_key_values=cache, **GREEDY)
    assert graphs == []
    expected = model.generate(ids, **GREEDY | {"max_new_tokens": 12, "min_new_tokens": 12})
    more = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(first, past_key_values=cache, **more), expected)


def test_where_it_cannot_be_compiled_decoding_goes_on(graphs, accelerator, monkeypatch, capsys):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no compiler\nin many words")

    ids = token_ids(1, 9)
    expected = family_model(False).generate(ids, **GREEDY)
    monkeypatch.setattr(torch, "compile", no_compiler)
    model = family_model()
    for _ in range(2):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    said = capsys.readouterr().err
    assert said.count("It cannot be compiled here (RuntimeError: no compiler); decoding goes") == 1
    with pytest.raises(RuntimeError, match="no compiler"):
        family_model(True).generate(ids, **GREEDY)


def test_a_mistake_in_a_call_is_not_taken_for_the_compilers(graphs, accelerator, capsys):
    model, ids = family_model(), token_ids(1, 9)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model.generate(ids, attention_mask=torch.ones(1, 5), **GREEDY)
    assert "cannot be compiled" not in capsys.readouterr().err
    model.generate(ids, **GREEDY)
    assert "Compiled in" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["options", "settings"])
def test_without_means_without(graphs, accelerator, where):
    """Also where something else asks for a static cache, with which transformers compiles."""
    model, ids, static = family_model(False), token_ids(1, 9), {"cache_implementation": "static"}
    expected = model.generate(ids, **GREEDY)
    if where == "settings":
        found = model.generate(ids, generation_config=GenerationConfig(**GREEDY, **static))
    else:
        found = model.generate(ids, **GREEDY, **static)
    assert torch.equal(found, expected)
    assert graphs == []


@pytest.mark.parametrize("then", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_a_static_cache_that_is_full_goes_on_in_a_longer_one(graphs, kind, then):
    sizes = {"attn_implementation": "eager", "sliding_window": 300} if kind == "gemma2" else {}
    model, ids = family_model(True, model_type=kind, **sizes), token_ids(1, 246)
    recycle.set_p(model, 4)
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, StaticCache)
    model.compiles = then
    second = model.generate(
        first.sequences, past_key_values=cache, **GREEDY, return_dict_in_generate=True
    )
    more = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    eager = family_model(False, model_type=kind, **sizes)
    assert torch.equal(second.sequences, eager.generate(ids, **more))
    assert recycle.change_p(model, second, 2).past_key_values is cache
    assert cache.layers[0].keys.shape[1:3] == (2 * 2, 300 if kind == "gemma2" else 384)


def test_copies_and_pickles_compile_for_themselves(graphs, capsys):
    model, ids = family_model(True), token_ids(1, 9)
    expected = model.generate(ids, **GREEDY)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    capsys.readouterr()
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other.generate(ids, **GREEDY), expected)
        assert capsys.readouterr().err.startswith("Compiling a step of P = 4")
        scramble(other, seed=9)
        changed = other.generate(ids, **GREEDY)
        assert not torch.equal(changed, expected)
        other.compiles = False
        assert torch.equal(other.generate(ids, **GREEDY), changed)
    count = len(graphs)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert len(graphs) == count
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("compiles", [True, False])
def test_a_call_keeps_the_p_that_it_began_with(graphs, compiles):
    model, ids = family_model(compiles), token_ids(1, 9)

    class Meddler(BaseStreamer):
        def put(self, value):
            recycle.set_p(model, 2)

        def end(self):
            pass

    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, streamer=Meddler(), **GREEDY), expected)
    assert recycle.get_p(model) == 2


@pytest.mark.parametrize("compiles", [True, False])
def test_a_policy_changes_p_within_a_call(graphs, compiles):
    policy, ids = Schedule({0: 4, 3: 2, 6: 1}), token_ids(2, 9)
    expected = policies.generate(stream_model(), policy, ids, **GREEDY)
    model = family_model(compiles)
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=32)
    found = policies.generate(model, policy, ids, past_key_values=cache, **GREEDY)
    assert found.used == expected.used == [4, 4, 4, 2, 2, 2, 1, 1]
    assert torch.equal(found.output, expected.output)
    assert (len(graphs) >= 3) is compiles


def test_threads_are_told_nothing_where_nothing_compiles(graphs, capsys):
    model, ids = family_model(), token_ids(1, 9)
    model.generate(ids, **GREEDY)
    thread = threading.Thread(target=partial(model.generate, ids, **GREEDY))
    thread.start()
    thread.join()
    assert capsys.readouterr().err == ""


def test_another_thread_takes_over_when_the_first_has_ended(graphs, capsys):
    model, ids = family_model(True), token_ids(1, 9)
    thread = threading.Thread(target=partial(model.generate, ids, **GREEDY))
    thread.start()
    thread.join()
    assert capsys.readouterr().err.count("Compiled in") == 1
    model.generate(ids, **GREEDY)
    assert capsys.readouterr().err.count("Compiled in") == 1


def test_another_thread_decodes_without(graphs, capsys):
    model, ids, found = family_model(True), token_ids(1, 9), []
    expected = model.generate(ids, **GREEDY)
    count = len(graphs)

    def run():
        with recycle.use_p(model, 2):
            found.append(model.generate(ids, **GREEDY))
        with recycle.use_p(model, 4):
            found.append(model.generate(ids, **GREEDY))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert torch.equal(found[1], expected)
    assert len(graphs) == count
    assert capsys.readouterr().err.count("Only the thread that generated first decodes by") == 1


def test_longer_texts_compile_a_few_lengths(graphs, capsys):
    model = family_model(True)
    for length in (5, 9, 200, 248, 249, 300):
        model.generate(token_ids(1, length), **GREEDY)
    said = capsys.readouterr().err
    assert said.count("Compiling") == 2
    assert "up to 384 tokens" in said
    config = model.config  # of a window of 1,024
    lengths = [cache_length(n, config) for n in (1, 256, 257, 385, 513, 769, 1024, 1030)]
    assert lengths == [256, 256, 384, 512, 768, 1024, 1024, 1030]


@pytest.mark.slow
def test_by_the_real_compiler(capsys):
    torch._dynamo.reset()
    model, eager, ids = family_model(True), family_model(False), token_ids(1, 9)
    for p in (4, 2, 4):
        with recycle.use_p(model, p), recycle.use_p(eager, p):
            assert torch.equal(model.generate(ids, **GREEDY), eager.generate(ids, **GREEDY))
    assert capsys.readouterr().err.count("Compiled in") == 2


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_step_copies_neither_prefix_nor_cache(kind):
    """No tensor that a step makes is as large as one layer's keys."""
    model = get_peft_model(tiny_model(kind), stream_config((2, 4))).eval()
    cache = StaticCache(config=model.config, max_cache_len=512)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if (
                isinstance(found, torch.Tensor)
                and found.untyped_storage().data_ptr() not in inputs
                and found.is_floating_point()
            ):
                largest = max(largest, found.numel())
            return found

    with torch.no_grad():
        model(token_ids(1, 9), past_key_values=cache)
        with Watch():
            model(token_ids(1, 1), past_key_values=cache)
    assert 0 < largest < cache.layers[0].keys.numel() / 2
