"""Generation in which a policy chooses P for every step.

A step is a pass that gives the next token of each sequence; the first one runs over the prompt.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

from recycle.errors import RecycleError
from recycle.family.change import change_cache
from recycle.family.switch import use_p
from recycle.parscale import find_decoder

PREPARE = "prepare_inputs_for_generation"  # transformers' method that begins a step
_installing = threading.Lock()


class PolicyError(RecycleError):
    """A policy makes no sense, or cannot run with these options."""


class Policy(Protocol):
    """Says P for each step. It keeps nothing itself, so one policy serves any number of threads."""

    watches: bool
    """Whether it looks at margins, for which every step waits for the device."""

    def next_p(self, used: Sequence[int], margins: Sequence[float]) -> int:
        """P of the next step, after steps with these P and, where it watches, these margins."""


@dataclass(frozen=True)
class Schedule:
    """P by the number of the step: `Schedule({0: 4, 64: 2})` is 4 for 64 new tokens, then 2."""

    p_from: dict[int, int]
    watches = False

    def __post_init__(self) -> None:
        if min(self.p_from, default=None) != 0:
            raise PolicyError(
                "A schedule says P from step 0 on, and from later steps where it changes, got "
                f"{self.p_from}. Write it like Schedule({{0: 4, 64: 2}})."
            )

    def next_p(self, used: Sequence[int], margins: Sequence[float]) -> int:
        return self.p_from[max(step for step in self.p_from if step <= len(used))]


@dataclass(frozen=True)
class Confidence:
    """More streams where the model is in doubt: up a ladder of P on a small margin, and down again.

    The margin of a step is the difference of the two largest probabilities, the smallest among the
    sequences that have not ended, and 1 where all have. It starts with the first P. Measure it
    before you use it: on the demo it brings nothing (`scripts/measure_policies.py`), since every
    way up is a pass over all tokens.
    """

    p_values: Sequence[int]
    """The ladder, such as `(1, 2, 4)`."""
    margin: float
    """Below it the next step has one P up."""
    patience: int
    """One P down after so many steps in a row at this P, none of them below."""
    watches = True

    def __post_init__(self) -> None:
        ascending = list(self.p_values) == sorted(set(self.p_values))
        if not (len(self.p_values) > 1 and ascending and self.patience >= 1):
            raise PolicyError(
                "Confidence takes two ascending p_values or more, and a patience of 1 or more, got "
                f"{self.p_values} and {self.patience}, as in Confidence((1, 2, 4), 0.2, 8)."
            )

    def next_p(self, used: Sequence[int], margins: Sequence[float]) -> int:
        if not used:
            return self.p_values[0]
        at, recent = self.p_values.index(used[-1]), margins[-self.patience :]
        if margins[-1] < self.margin:
            at = min(at + 1, len(self.p_values) - 1)
        elif list(used[-self.patience :]) == [used[-1]] * self.patience:
            at = max(at - (min(recent) >= self.margin), 0)
        return self.p_values[at]


class Generated(NamedTuple):
    """What `generate` gives."""

    output: Any
    """What the model's own `generate` returned."""
    used: list[int]
    """P of each step."""


def generate(
    model: Any,
    policy: Policy,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Generated:
    """Generate with the P that a policy chooses, in this thread only. See `change_p` for the cost.

    On an accelerator it compiles its steps only with a `StaticCache` given as `past_key_values`,
    for which transformers compiles of itself; the default cache takes the ordinary way.

    Args:
        model: A causal LM with a family of adapters, as `recycle.load` gives.
        policy: Such as `Schedule({0: 4, 64: 2})`.
        input_ids: Prompts [B, S].
        attention_mask: [B, S]; without it every token counts.
        **options: Of the model's `generate`, among them `past_key_values`: an empty `StaticCache`,
            or a `DynamicCache`, which is the default.

    Raises:
        PolicyError: The options keep no cache, or try several tokens in a step.
        FamilyError: The policy chooses a P that the family does not offer.
    """
    cache = options.pop("past_key_values", None)
    cache = DynamicCache(config=find_decoder(model).config) if cache is None else cache
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    given = options.pop("logits_processor", None) or []
    configs = (options.get("generation_config"), model.generation_config)
    ends = next((x.eos_token_id for x in configs if x and x.eos_token_id is not None), None)
    ends = options.get("eos_token_id", ends)
    with ExitStack() as choice:
        steps = _Steps(model, policy, cache, mask, ends, choice)
        choice.enter_context(_told(model, steps))
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            past_key_values=cache,
            logits_processor=LogitsProcessorList([*given, steps]),
            **options,
        )
    return Generated(output, steps.used)


class _Steps(LogitsProcessor):
    """Called after every step, with the tokens that are in the cache and the next one's scores."""

    def __init__(
        self,
        model: Any,
        policy: Policy,
        cache: Cache,
        mask: Tensor,
        ends: int | list[int] | None,
        choice: ExitStack,
    ) -> None:
        self.model, self.policy, self.cache, self.mask = model, policy, cache, mask
        self.ends = torch.tensor([] if ends is None else ends, device=mask.device)
        self.streams = choice.enter_context(ExitStack())  # holds this thread's P
        self.used: list[int] = []
        self.margins: list[float] = []
        self.p = self.wanted = policy.next_p((), ())
        self.streams.enter_context(use_p(model, self.p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.used.append(self.p)
        if self.policy.watches:
            first, second = scores.softmax(dim=-1).topk(2).values.unbind(dim=-1)
            ended = torch.isin(input_ids[:, self.mask.shape[1] :], self.ends).any(dim=1)
            self.margins.append(float((first - second).masked_fill(ended, 1.0).min()))
        self.wanted = self.policy.next_p(self.used, self.margins)
        held = int(self.cache.get_seq_length())
        if self.wanted != self.p and held != input_ids.shape[1]:
            raise PolicyError(
                "A policy changes P where each step leaves one token in the cache; the cache holds "
                f"{held} tokens of {input_ids.shape[1]}. Leave out use_cache=False, and what "
                "proposes several tokens at once (assistant_model, prompt_lookup_num_tokens)."
            )
        return scores

    def begin(self, input_ids: Tensor) -> None:
        """Take up the P that was wanted after the last step, now that there is another one."""
        if self.wanted == self.p:
            return
        held = input_ids[:, : self.cache.get_seq_length()]
        change_cache(self.model, self.cache, held, self.wanted, self.mask)
        self.streams.close()
        self.streams.enter_context(use_p(self.model, self.wanted))
        self.p = self.wanted


class _Preparation:
    """What prepares each step of a causal LM, outside of what is compiled, and says it begins.

    Generations in several threads share it; their caches tell them apart.
    """

    def __init__(self, own: Any) -> None:
        functools.update_wrapper(self, own)  # transformers reads its signature
        self.own, self.running = own, dict[int, _Steps]()

    def __call__(self, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        steps = self.running.get(id(options.get("past_key_values")))
        if steps is not None:
            steps.begin(input_ids)
        return self.own(input_ids, *args, **options)


@contextmanager
def _told(model: Any, steps: _Steps) -> Iterator[None]:
    """Let `steps` know of every step that begins."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    with _installing:
        preparation = getattr(causal_lm, PREPARE)
        if not isinstance(preparation, _Preparation):
            preparation = _Preparation(preparation)
            setattr(causal_lm, PREPARE, preparation)
        preparation.running[id(steps.cache)] = steps
    try:
        yield
    finally:
        with _installing:
            del preparation.running[id(steps.cache)]
            if not preparation.running:
                setattr(causal_lm, PREPARE, preparation.own)
