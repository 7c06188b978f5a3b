"""How many questions every model of the table answers right by greedy decoding.

Dimensions: B questions of a batch, S tokens of its longest prompt, N new tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from recycle import world
from recycle.backbone.generation import decoding
from recycle.data.tasks import is_right
from recycle.parscale import ActiveStreams, choose_streams


class Question(NamedTuple):
    prompt_ids: list[int]  # up to where the reply begins
    answer: str


def answers_right(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, ActiveStreams | None],
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int = 48,
    advance: Callable[[int], None] = lambda questions: None,
) -> dict[str, list[bool]]:
    """Whether each reply gives the answer, as `recycle.data.tasks.is_right` has it.

    Args:
        model: In eval mode.
        tokenizer: The backbone's; has an end-of-sequence token.
        rows: The streams of each row of the table.
        questions: Prompts of at least one token, which with a reply fit the backbone's window.
        batch_size: Questions decoded at once.
        max_new_tokens: A reply is cut off there.
        advance: Called with the questions done.

    Returns:
        By the row's name, in the questions' order.
    """
    right: dict[str, list[bool]] = {name: [] for name in rows}
    for name, active in rows.items():

        def answered(start: int, active: ActiveStreams | None = active) -> list[bool]:
            batch = questions[start : start + batch_size]
            with choose_streams(model, active):
                prompts = [question.prompt_ids for question in batch]
                replies = decode_replies(model, tokenizer, prompts, max_new_tokens)
            advance(len(batch) * world.size())
            return [
                is_right(tokenizer.decode(reply), question.answer)
                for question, reply in zip(batch, replies, strict=True)
            ]

        for found in world.share(range(0, len(questions), batch_size), answered):
            right[name] += found
    return right


def decode_replies(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stops: Sequence[str] = (),
) -> list[list[int]]:
    """The tokens with which the streams in use go on, up to an end or any other special token.

    The end of a turn in a chat template is special, but not always among the ends. With `stops` a
    reply goes no further than the first of these texts, where all others of the batch have ended.
    """
    stopping = {"stop_strings": list(stops), "tokenizer": tokenizer} if stops else {}
    special = [x for x, token in tokenizer.added_tokens_decoder.items() if token.special]
    with decoding(model, temperature, top_p):
        eos = model.generation_config.eos_token_id  # one, several or none
        eos = eos if isinstance(eos, list) else [eos]
        ends = {*special, *eos} - {None}
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = [[tokenizer.eos_token_id] * n + x for n, x in zip(padding, prompts, strict=True)]
        seen = [[0] * n + [1] * (longest - n) for n in padding]
        tokens = model.generate(
            input_ids=torch.tensor(ids, device=model.device),  # [B, S]
            attention_mask=torch.tensor(seen, device=model.device),  # [B, S]
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.eos_token_id,
            **stopping,
        )  # [B, S + N]
    replies = tokens[:, longest:].tolist()
    return [list(takewhile(lambda token: token not in ends, reply)) for reply in replies]
