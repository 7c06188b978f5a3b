"""Conversations as token ids: what is learned under templates of every shape, token by token.

The templates are written for these tests, each in the shape of a family's: what it puts around a
turn, what it refuses, and what it changes as a conversation goes on.
"""

import json

import pytest
from tokenizers.processors import TemplateProcessing

from recycle.data import IGNORED, DataError
from recycle.data.chat import prompt_ids, read_conversation, render

from .tiny import tiny_tokenizer

IM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
TEMPLATES = {
    "qwen2.5": TOOLS
    + IM.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}"
        "</tool_call>{% endfor %}",
    ),
    # Thoughts only in the last turn, where an empty block stands for none.
    "qwen3": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set said = m.content.split('</think>')[-1].strip() %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content }}"
    "\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3.1": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "smollm2": IM,
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    " {{ m.content }}{{ eos_token }}{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}",
    "marked": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{%- generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "thinking": IM.replace("assistant\n", "assistant\n<think>\n"),
    "unended": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
]
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And more?"},
    {"role": "assistant", "content": "No more."},
]


def tokenizer_of(family):
    """A byte-level tokenizer that would itself add a beginning, as those of Llama and Gemma do."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def spoken(*messages):
    return read_conversation({"messages": list(messages)}, "messages", "a.jsonl:3")


def learned(example, tokenizer):
    """The texts of the runs of labels, which must be the ids themselves."""
    runs, before = [], IGNORED
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != IGNORED:
            assert label == token
            runs += [[]] if before == IGNORED else []
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


IM_ENDED = ["Hello.<|im_end|>", "No more.<|im_end|>"]
ONE_EXAMPLE = {
    "qwen2.5": IM_ENDED,
    "smollm2": IM_ENDED,
    "marked": IM_ENDED,
    "llama3.1": ["Hello.<|eot_id|>", "No more.<|eot_id|>"],
    "gemma": ["Hello.<end_of_turn>", "No more.<end_of_turn>"],
    "mistral": [" Hello.<|endoftext|>", " No more.<|endoftext|>"],
    "unended": ["Hello.\n", "No more.\n"],
}


@pytest.mark.parametrize("family", ONE_EXAMPLE)
def test_a_template_that_goes_on_as_it_began_gives_one_example(family):
    tokenizer = tokenizer_of(family)
    messages = TALK if family in ("gemma", "mistral") else [SYSTEM, *TALK]
    conversation = spoken(*messages)
    (example,), apart = render(conversation, tokenizer)
    assert learned(example, tokenizer) == ONE_EXAMPLE[family]
    assert not apart
    assert example.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    begun = family in ("llama3.1", "gemma", "mistral")
    assert example.input_ids.count(tokenizer.bos_token_id) == begun
    seen = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert prompt_ids(conversation, tokenizer) == seen
    assert example.input_ids[: len(seen)] == seen


@pytest.mark.parametrize("family", ["qwen2.5", "marked"])
def test_only_the_completion_of_a_conversation_is_learned(family):
    tokenizer = tokenizer_of(family)
    conversation = read_conversation(
        {"prompt": [SYSTEM, *TALK[:3]], "completion": TALK[3:]}, "messages", "a.jsonl:3"
    )
    (example,), _ = render(conversation, tokenizer)
    assert conversation.learned == (4,)
    assert learned(example, tokenizer) == ["No more.<|im_end|>"]
    assert example.input_ids == tokenizer.apply_chat_template([SYSTEM, *TALK])["input_ids"]


def test_marks_decide_what_is_learned():
    tokenizer, ended = tokenizer_of("marked"), "<|im_end|>{% endgeneration %}"
    assert ended in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(
        ended, "{% endgeneration %}<|im_end|>"
    )
    (example,), _ = render(spoken(*TALK), tokenizer)
    assert learned(example, tokenizer) == ["Hello.", "No more."]
    nothing = {"role": "assistant", "content": ""}
    assert render(spoken(TALK[0], nothing), tokenizer) == ([], False)


def test_a_template_that_changes_earlier_turns_gives_an_example_per_turn():
    tokenizer = tokenizer_of("qwen3")
    thought = {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello."}
    conversation = spoken(SYSTEM, TALK[0], thought, *TALK[2:])
    (first, second), apart = render(conversation, tokenizer)
    assert apart
    said = "<think>\nA greeting.\n</think>\n\nHello.<|im_end|>"
    assert learned(first, tokenizer) == [said]
    assert learned(second, tokenizer) == ["<think>\n\n</think>\n\nNo more.<|im_end|>"]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
    assert tokenizer.decode(first.input_ids) == f"{prompt}<|im_start|>assistant\n{said}\n"
    seen = prompt_ids(conversation, tokenizer)
    told = "assistant\nHello.<|im_end|>\n<|im_start|>user\nAnd more?<|im_end|>\n<|im_start|>"
    assert tokenizer.decode(seen).endswith(f"{told}assistant\n")
    assert second.input_ids[: len(seen)] == seen


def test_one_turn_of_a_template_that_changes_earlier_turns_is_no_turn_apart():
    rendering = render(spoken(*TALK[:2]), tokenizer_of("qwen3"))
    assert (len(rendering.examples), rendering.apart) == (1, False)


def test_a_turn_that_does_not_begin_with_its_prompt_is_not_learned():
    tokenizer = tokenizer_of("thinking")
    assert render(spoken(*TALK), tokenizer) == ([], True)
    thought = {"role": "assistant", "content": "<think>\nEnough.</think>No more."}
    (example,), apart = render(spoken(*TALK[:3], thought), tokenizer)
    assert (learned(example, tokenizer), apart) == (["Enough.</think>No more.<|im_end|>"], True)


def test_a_prompt_whose_last_token_would_grow_is_tokenised_by_itself():
    tokenizer = tokenizer_of("smollm2")
    tokenizer.add_tokens(["\n\n"])
    conversation = spoken(TALK[0], {"role": "assistant", "content": "\nHello."})
    (example,), apart = render(conversation, tokenizer)
    seen = prompt_ids(conversation, tokenizer)
    assert (example.input_ids[: len(seen)], apart) == (seen, True)
    assert learned(example, tokenizer) == ["\nHello.<|im_end|>"]


def test_a_turn_ends_at_its_last_special_token_only_where_nothing_is_said_after_it():
    tokenizer = tokenizer_of("unended")
    conversation = spoken(TALK[0], {"role": "assistant", "content": "<think>Hm</think>Hello. "})
    (example,), _ = render(conversation, tokenizer)
    assert learned(example, tokenizer) == ["<think>Hm</think>Hello. \n"]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("def f", "(x): pass"), ("<bos>def f", "(x)<|endoftext|>"), ("", "x"), ("left re", "turn")],
)
def test_a_plain_pair_is_text_with_its_completion_learned(prompt, completion):
    tokenizer = tokenizer_of("qwen2.5")
    tokenizer.chat_template = None
    row = {"prompt": prompt, "completion": completion}
    conversation = read_conversation(row, "messages", "a.jsonl:3")
    (example,), apart = render(conversation, tokenizer)
    assert learned(example, tokenizer) == [
        completion.removesuffix("<|endoftext|>") + "<|endoftext|>"
    ]
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    seen = prompt_ids(conversation, tokenizer)
    assert tokenizer.decode(seen) == "<bos>" + prompt.removeprefix("<bos>")
    assert example.input_ids[: len(seen)] == seen
    assert (conversation.text(), apart) == (f"{prompt}\n{completion}".strip(), False)


@pytest.mark.parametrize("field", ["conversations", "messages"])
def test_turns_of_sharegpt_are_read_with_their_tools(field):
    tools = [{"name": "sum", "parameters": {}}]
    call = {"name": "sum", "arguments": {"of": [1, 2]}}
    turns = [
        ("system", "Add."), ("human", "1 and 2?"), ("function_call", json.dumps(call)),
        ("observation", "3"), ("gpt", "It is 3."),
    ]  # fmt: skip
    row = {field: [{"from": name, "value": text} for name, text in turns]}
    conversation = read_conversation(row | {"tools": json.dumps(tools)}, "messages", "a.jsonl:3")
    asked = {"type": "function", "function": call}
    assert conversation.messages == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 and 2?"},
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    assert (conversation.tools, conversation.learned) == (tools, (2, 4))
    assert conversation.text() == "1 and 2?\n3\nIt is 3."
    tokenizer = tokenizer_of("qwen2.5")
    (example,), _ = render(conversation, tokenizer)
    assert learned(example, tokenizer) == [
        f"<tool_call>{json.dumps(call)}</tool_call><|im_end|>", "It is 3.<|im_end|>"
    ]  # fmt: skip
    assert tokenizer.decode(example.input_ids).startswith(json.dumps(tools[0]) + "\n")


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_are_none(tools):
    row = {"messages": TALK, "tools": tools}
    assert read_conversation(row, "messages", "a.jsonl:3").tools is None


def test_parts_of_text_are_joined_and_other_keys_of_a_message_are_kept():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    conversation = spoken(TALK[0], {"role": "assistant", "content": parts, "name": "Ann"})
    assert conversation.messages[1] == {"role": "assistant", "content": "Hello.", "name": "Ann"}


def test_an_opening_of_the_assistant_answers_nothing_and_is_not_learned():
    conversation = spoken(TALK[1], *TALK)
    assert conversation.learned == (2, 4)
    (example,), _ = render(conversation, tokenizer_of("smollm2"))
    assert learned(example, tokenizer_of("smollm2")) == IM_ENDED


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"text": "x", "id": 3}, "the row has the fields text, id."),
        ({"messages": "Hello"}, "'Hello' stands where a list of messages is expected."),
        ({"messages": ["Hello"]}, "'Hello' stands where a message is expected."),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "a message has `role` 'narrator'."),
        ({"conversations": [{"text": "x"}]}, "a message has `from` None."),
        ({"messages": [{"role": "user", "content": 3}]}, "`content` of a message of user is 3."),
        ({"messages": [{"role": "user"}]}, "`content` of a message of user is None."),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "`content` of a message of user is [{'type': 'image'}].",
        ),
        ({"messages": []}, "the assistant answers nothing."),
        ({"messages": TALK[:1]}, "the assistant answers nothing."),
        ({"messages": TALK[1:2]}, "the assistant answers nothing."),
        ({"prompt": TALK, "completion": TALK[:1]}, "the assistant answers nothing."),
        ({"prompt": "Hi", "completion": TALK[1:2]}, "'Hi' stands where a list of messages"),
        ({"messages": TALK, "tools": "sum"}, "`tools` is a list of JSON schemas, not 'sum'."),
        (
            {"messages": [TALK[0], {"from": "function_call", "value": "sum"}]},
            "a function_call is JSON with name and arguments, not 'sum'.",
        ),
    ],
)
def test_rows_of_other_kinds_are_refused(row, found):
    with pytest.raises(DataError) as refused:
        read_conversation(row, "messages", "a.jsonl:3")
    assert str(refused.value).startswith(f"a.jsonl:3: {found}")
    assert "`prompt` and `completion`" in str(refused.value)
    assert str(refused.value).endswith("or set data.format=text.")


def test_what_the_template_refuses_is_told_in_its_own_words():
    with pytest.raises(
        DataError, match=r"^a\.jsonl:3: .* conversation: System role not supported\. "
    ):
        render(spoken(SYSTEM, *TALK), tokenizer_of("gemma"))
    with pytest.raises(DataError, match="Roles must alternate"):
        prompt_ids(spoken(TALK[0], *TALK), tokenizer_of("gemma"))


def test_a_tokenizer_without_a_template_names_the_ways_out():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(
        DataError, match=r"a\.jsonl:3.*instruct model.*`chat_template`.*data\.format=text"
    ):
        render(spoken(*TALK), tokenizer)
