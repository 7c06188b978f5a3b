"""Questions answered by greedy decoding, in batches, by each model of the table."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

from recycle.evaluate import passes_of
from recycle.evaluate.answers import Question, answers_right, decode_replies
from recycle.evaluate.passes import rows_of
from recycle.parscale import choose_streams, streams_of
from tests.adapters import scramble, stream_config, token_ids
from tests.tiny import EOS_ID, tiny_model, tiny_tokenizer

NEW = 8
PROMPTS = [token_ids(length, seed=length).tolist() for length in (3, 12, 1, 7, 8)]
NAMES = ["backbone", "control", "P = 2"]


@pytest.fixture(params=["qwen2", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    model = get_peft_model(tiny_model(request.param), stream_config((2,)), adapter_name="p2")
    model.add_adapter("control", stream_config((1,)))
    scramble(model)
    return model.eval()


@torch.no_grad()
def alone(model: Any, prompt: list[int], ends: set[int]) -> list[int]:
    """The reply to one prompt, without padding and without a cache."""
    ids = list(prompt)
    for _ in range(NEW):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_a_batch_goes_on_as_each_prompt_does_alone(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    replies = {}
    for name, active in rows_of(passes_of(model)).items():
        with choose_streams(model, active):
            expected = [alone(model, prompt, {0, 1, 2}) for prompt in PROMPTS]
            replies[name] = decode_replies(model, tokenizer, PROMPTS, NEW)
        assert replies[name] == expected
    assert list(replies) == NAMES
    assert replies["backbone"] != replies["control"] != replies["P = 2"]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_each_row_is_right_where_its_reply_gives_the_answer(model: Any, batch_size: int) -> None:
    tokenizer, rows = tiny_tokenizer(), rows_of(passes_of(model))
    with choose_streams(model, rows["P = 2"]):
        said = [tokenizer.decode(alone(model, prompt, {0, 1, 2})) for prompt in PROMPTS]
    said[3] = "something else"
    questions = [Question(*pair) for pair in zip(PROMPTS, said, strict=True)]
    done: list[int] = []
    right = answers_right(model, tokenizer, rows, questions, batch_size, NEW, done.append)
    assert list(right) == NAMES
    assert right["P = 2"] == [True, True, True, False, True]
    assert not any(right["backbone"])
    assert sum(done) == 3 * 5


@pytest.mark.parametrize("where", ["generation settings", "added token", "extra special token"])
def test_a_reply_ends(model: Any, where: str) -> None:
    tokenizer = tiny_tokenizer()
    expected = alone(model, PROMPTS[0], {EOS_ID})
    end = expected[2]
    expected = expected[: expected.index(end)]
    if where == "generation settings":
        model.get_base_model().generation_config.eos_token_id = [EOS_ID, end]
    elif where == "added token":
        tokenizer.add_tokens(tokenizer.convert_ids_to_tokens([end]), special_tokens=True)
    else:
        token = tokenizer.convert_ids_to_tokens(end)
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    assert decode_replies(model, tokenizer, PROMPTS[:3], NEW)[0] == expected


def test_generation_settings_change_nothing_and_are_as_before(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    plain = decode_replies(model, tokenizer, PROMPTS, NEW)
    settings = GenerationConfig(
        eos_token_id=EOS_ID, do_sample=True, temperature=5.0, num_beams=3, repetition_penalty=50.0
    )
    model.generation_config = model.get_base_model().generation_config = settings
    before, streams = settings.to_dict(), streams_of(model).selection.current()
    sides = tokenizer.padding_side, tokenizer.truncation_side
    rows = rows_of(passes_of(model))
    assert decode_replies(model, tokenizer, PROMPTS, NEW) == plain
    answers_right(model, tokenizer, rows, [Question(PROMPTS[0], "1")], 1, NEW)
    assert model.generation_config is model.get_base_model().generation_config is settings
    assert settings.to_dict() == before
    assert streams_of(model).selection.current() == streams
    assert (tokenizer.padding_side, tokenizer.truncation_side) == sides
