"""A policy's P is in use at its step, and every token is the one that this P gives."""

import itertools
import threading
from contextlib import ExitStack

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    SuppressTokensLogitsProcessor,
)

import recycle
from recycle.decode.policy import Confidence, PolicyError, Schedule, _Steps, generate
from tests.adapters import scramble, stream_config, stream_model, token_ids
from tests.tiny import PAD_ID, tiny_model

NEW = 12
MARGIN = 0.006  # between those of this model's steps
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
PROMPT = token_ids(2, 7).masked_fill(MASK == 0, PAD_ID)


def make_model(name="qwen2", **sizes):
    model = stream_model(tiny_model(name, **sizes))
    model.add_adapter("p3", stream_config((3,)))
    scramble(model)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
def step_by_step(model, used, ids=PROMPT, mask=MASK):
    """Greedy tokens, each from a pass without a cache over all tokens, at that step's P."""
    for p in used:
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        with recycle.use_p(model, p):
            output = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(dim=-1)], dim=1)
        mask = F.pad(mask, (0, 1), value=1)
    return ids


def static(model):
    return StaticCache(model.config, max_cache_len=24)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "p_from", [{0: 4, 5: 2}, {0: 2, 5: 4}, {0: 4, 3: 1, 7: 2}, {0: 1, 2: 3, 4: 4, 6: 2, 8: 1}]
)
def test_every_token_is_that_of_the_step_s_p(model, p_from, kind):
    cache = static(model) if kind == "static" else None
    found = generate(model, Schedule(p_from), PROMPT, MASK, past_key_values=cache, **OPTIONS)
    assert found.used == [p_from[max(x for x in p_from if x <= i)] for i in range(NEW)]
    assert torch.equal(found.output, step_by_step(model, found.used))


def test_windows_and_other_steps():
    model = make_model("gemma2", sliding_window=6, head_dim=16)
    found = generate(model, Schedule({0: 2, 4: 4, 8: 2}), PROMPT, MASK, **OPTIONS)
    assert torch.equal(found.output, step_by_step(model, found.used))


def test_several_sequences_for_a_prompt(model):
    """They are drawn the same with one P as without a policy, and P can change."""
    options = OPTIONS | {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    with recycle.use_p(model, 2):
        expected = model.generate(PROMPT, attention_mask=MASK, **options)
    torch.manual_seed(0)
    assert torch.equal(generate(model, Schedule({0: 2}), PROMPT, MASK, **options).output, expected)
    torch.manual_seed(0)
    found = generate(model, Schedule({0: 2, 6: 4}), PROMPT, MASK, **options).output
    assert torch.equal(found[:, : 7 + 6], expected[:, : 7 + 6])
    assert not torch.equal(found, expected)


def test_confidence_goes_up_in_doubt_and_down_after_patience(model):
    scores = {"return_dict_in_generate": True, "output_scores": True}
    policy = Confidence((1, 2, 4), margin=MARGIN, patience=2)
    found = generate(model, policy, PROMPT, MASK, **OPTIONS, **scores)
    best = torch.stack([x.softmax(dim=-1).topk(2).values for x in found.output.scores])
    margins = (best[..., 0] - best[..., 1]).amin(dim=1).tolist()
    assert found.used == [policy.next_p(found.used[:i], margins[:i]) for i in range(NEW)]
    moves = [after - before for before, after in itertools.pairwise(found.used)]
    assert min(moves) < 0 < max(moves)
    assert torch.equal(found.output.sequences, step_by_step(model, found.used))


def test_confidence_waits_again_at_each_p():
    policy = Confidence((2, 4), margin=0.5, patience=3)
    assert policy.next_p([], []) == 2
    assert policy.next_p([2], [0.4]) == 4
    assert policy.next_p([2, 4, 4], [0.4, 0.9, 0.9]) == 4
    assert policy.next_p([2, 4, 4, 4], [0.4, 0.9, 0.9, 0.9]) == 2
    assert policy.next_p([4, 4, 4, 4], [0.4, 0.4, 0.9, 0.9]) == 4
    assert policy.next_p([4], [0.1]) == 4
    assert policy.next_p([2, 2, 2], [0.9, 0.9, 0.9]) == 2


def test_threads_have_policies_of_their_own(model):
    policies = [Schedule({0: 4, 6: 1}), Schedule({0: 1, 4: 2, 8: 4})]
    found, start = {}, threading.Barrier(2)

    def work(i):
        start.wait()
        for turn in range(3):
            found[i, turn] = generate(model, policies[i], PROMPT, MASK, **OPTIONS)

    recycle.set_p(model, 3)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for each in found.values():
        assert torch.equal(each.output, step_by_step(model, each.used))
    assert recycle.get_p(model) == 3


class Watcher:
    """Notes the margins that it is shown; P is 4 and 2 in turn."""

    watches = True

    def next_p(self, used, margins):
        self.margins = list(margins)
        return (4, 2)[len(used) % 2]


@pytest.mark.parametrize("way", ["option", "config", "model", "list"])
def test_margins_are_of_the_sequences_that_have_not_ended(model, way, monkeypatch):
    """The first of two ends at once; from then on they are those of the second alone."""
    watcher, ids = Watcher(), token_ids(2, 7)
    generate(model, watcher, ids[1:], **OPTIONS)
    alone = watcher.margins
    greedy = generate(model, watcher, ids, **OPTIONS).output
    assert watcher.margins[1:] != pytest.approx(alone[1:], abs=1e-6)
    end = int(greedy[0, 7])
    assert end not in greedy[1, 7:]
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD_ID}
    if way == "option":
        options["eos_token_id"] = end
    elif way == "config":
        options = {"generation_config": GenerationConfig(**options, eos_token_id=end)}
    else:
        ends = [383, end] if way == "list" else end
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    both = generate(model, watcher, ids, **options).output
    assert (both[0, 8:] == PAD_ID).all()
    assert len(alone) == NEW
    assert watcher.margins[1:] == pytest.approx(alone[1:], abs=1e-6)


def test_where_all_have_ended_the_margin_is_one(model):
    cache, watcher = DynamicCache(config=model.config), Watcher()
    with ExitStack() as choice:
        steps = _Steps(model, watcher, cache, MASK, [5], choice)
        with recycle.use_p(model, 4):
            model(F.pad(PROMPT, (0, 1), value=5), past_key_values=cache)
        steps(F.pad(PROMPT, (0, 1), value=5), torch.zeros(2, 384))
    assert steps.margins == [1.0]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_p_does_not_change_after_the_last_step(model, kind):
    """What would cost a pass for nothing, and leave a cache of another P than the last step's."""
    for policy, options in (
        (Schedule({0: 4, NEW: 1}), OPTIONS),
        (Schedule({0: 4, 1: 1}), OPTIONS | {"eos_token_id": list(range(384))}),  # ends at once
    ):
        cache = static(model) if kind == "static" else DynamicCache(config=model.config)
        rows = []
        layer = model.get_base_model().model.layers[0]
        hook = layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0]))
        ids = token_ids(2, 7)
        found = generate(model, policy, ids, past_key_values=cache, **options)
        hook.remove()
        assert set(found.used) == {4}
        assert len(rows) == len(found.used)
        assert cache.num_streams == 4


def test_the_model_is_as_before(model):
    causal_lm = model.get_base_model()
    before = causal_lm.prepare_inputs_for_generation
    generate(model, Schedule({0: 4, 2: 2}), PROMPT, MASK, **OPTIONS)
    assert causal_lm.prepare_inputs_for_generation == before


def test_a_compiled_step_follows_the_policy(model):
    """Where transformers compiles: what changes P runs outside of the graph."""
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    options = OPTIONS | {"past_key_values": static(model), "compile_config": compile_config}
    found = generate(model, Schedule({0: 4, 3: 1, 6: 2, 9: 4}), PROMPT, MASK, **options)
    assert torch.equal(found.output, step_by_step(model, found.used))
    assert "_compiled_call" in vars(model.get_base_model())


def test_processors_of_the_caller_s(model):
    """They come first, and what they refuse does not come."""
    best = int(generate(model, Schedule({0: 2}), PROMPT, MASK, **OPTIONS).output[0, 7])
    none = LogitsProcessorList([SuppressTokensLogitsProcessor([best])])
    found = generate(model, Schedule({0: 2}), PROMPT, MASK, logits_processor=none, **OPTIONS)
    assert best not in found.output[:, 7:]
    assert len(found.used) == NEW
    assert len(none) == 1


def test_what_a_policy_cannot_do(model):
    with pytest.raises(PolicyError, match=r"from step 0 on.*got \{3: 2\}"):
        Schedule({3: 2})
    with pytest.raises(PolicyError, match=r"two ascending p_values.*got \(4, 2\)"):
        Confidence((4, 2), 0.1, 1)
    for options in ({"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
        ids = token_ids(1, 4).repeat(1, 3)
        with pytest.raises(PolicyError, match="each step leaves one token in the cache"):
            generate(model, Schedule({0: 4, 4: 2}), ids, **OPTIONS, **options)
    with pytest.raises(recycle.errors.RecycleError, match="got p=5"):
        generate(model, Schedule({0: 4, 4: 5}), PROMPT, **OPTIONS)
    recycle.set_p(model, 2)
    assert recycle.get_p(model) == 2  # nothing is left of them in this thread
