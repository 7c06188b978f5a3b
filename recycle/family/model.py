"""PEFT's model, as a backbone has it whose families come and go and whose `generate` is fast."""

import copy
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import Thread, current_thread
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.generation import GenerationMode

from recycle.parscale import ActiveStreams, ParScaleConfig, choose_streams, streams_of
from recycle.parscale.cache import lengthen_cache

SHORTEST_CACHE = 256  # tokens; two lengths for each doubling, so that few steps are compiled
COMPILED_STEPS = 256  # at most: of all P, batches and lengths of cache
WARM_UP = 3  # tokens: one of the prefill, one that compiles, one that records a CUDA graph
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
COMPILED = ("_compiled_call", "_last_compile_config")  # where transformers keeps what it compiled


class Steps:
    """The compiled steps of a model. A copy of the model has none yet."""

    def __init__(self) -> None:
        self.thread: Thread | None = None
        self.warm: set[tuple[ActiveStreams | None, int, int]] = set()  # streams, batch, length
        self.compiled: dict[str, Any] = {}
        self.told = False  # that another thread goes without

    def __reduce__(self) -> tuple[type["Steps"], tuple[()]]:
        return Steps, ()

    def belong_here(self) -> bool:
        """Whether they are this thread's: the first that asks, or the next when that has ended."""
        if self.thread is None or not self.thread.is_alive():
            self.thread = current_thread()
            self.warm.clear()
        return self.thread is current_thread()


class FamilyModel(PeftModelForCausalLM):
    """A backbone with its families of adapters.

    On an accelerator `generate` takes a static cache and a compiled step, as transformers does when
    it is asked for a static cache. The first call of every P, batch and length of cache compiles,
    and says so on standard error; changing P keeps what is compiled. Beams, a cache of another
    kind, quantised weights and models that cannot be compiled take transformers' ordinary way. So
    does every thread but one, since a CUDA graph belongs to a thread. A call keeps the P that was
    in use when it began.
    """

    compiles: bool | None = False
    """None is on an accelerator, True everywhere; what `recycle.load` was told."""
    foundation: ParScaleConfig
    """Of the first adapter, which says what weights it stands on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = Steps()

    @property
    def active_peft_config(self) -> PeftConfig:
        """PEFT asks for it in every call, also where no adapter is left."""
        return self.peft_config[self.active_adapter] if self.peft_config else ParScaleConfig()

    @property
    def has_active_enabled_adapter(self) -> bool:
        return bool(self.peft_config) and super().has_active_enabled_adapter

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Any:
        """As in transformers."""
        given = {"inputs": inputs, "generation_config": generation_config}
        options |= {name: value for name, value in given.items() if value is not None}
        if isinstance(options.get("past_key_values"), StaticCache):
            self._make_room(options)
        with choose_streams(self, streams_of(self).selection.current()):
            if self.compiles is False:
                return super().generate(**_with(options, {"disable_compile": True}))
            if not self.steps.belong_here():
                if self.steps.warm and not self.steps.told:
                    _say("Only the thread that generated first decodes by compiled steps.")
                self.steps.told = bool(self.steps.warm)
                return super().generate(**_with(options, {"disable_compile": True}))
            with self._compiling():
                return super().generate(**_with(options, self._settings(options)))

    def _make_room(self, options: Mapping[str, Any]) -> None:
        """Lengthen a static cache, such as an earlier call returned, for what is to come."""
        cache, text_config = options["past_key_values"], self.config.get_text_config()
        needed = self._prepared(options)[1]
        if _room(cache) < needed:
            lengthen_cache(cache, text_config, cache_length(needed, text_config))

    def _prepared(self, options: Mapping[str, Any]) -> tuple[GenerationConfig, int]:
        """The settings of a call, and how many tokens there are at its end, at most."""
        given = {"generation_config": None, **options}
        config, _ = self.get_base_model()._prepare_generation_config(
            given.pop("generation_config"), **given
        )
        new_tokens = config.max_new_tokens or config.max_length or 20  # transformers' own default
        tokens = options.get("input_ids", options.get("inputs"))
        return config, new_tokens + (tokens.shape[1] if isinstance(tokens, Tensor) else 0)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Let transformers find what it compiled, which no copy or pickle of a model may hold."""
        causal_lm = vars(self.get_base_model())
        causal_lm.update(self.steps.compiled)
        try:
            with torch._dynamo.config.patch(recompile_limit=COMPILED_STEPS):
                yield
        finally:
            self.steps.compiled = {x: causal_lm.pop(x) for x in COMPILED if x in causal_lm}

    def _settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What makes `generate` decode by steps that are compiled; empty if it is to do without."""
        causal_lm, cache = self.get_base_model(), options.get("past_key_values")
        tokens = options.get("input_ids", options.get("inputs"))
        settings: dict[str, Any] = {} if cache is not None else {"cache_implementation": "static"}
        if self.compiles:
            settings["compile_config"] = CompileConfig()
            settings["compile_config"]._compile_all_devices = True
        if not (isinstance(tokens, Tensor) and (cache is None or isinstance(cache, StaticCache))):
            return {}
        if not settings.keys().isdisjoint(options):
            return {}
        config, needed = self._prepared(_with(options, settings))
        text_config = causal_lm.config.get_text_config()
        length = cache_length(needed, text_config) if cache is None else _room(cache)
        if cache is None:
            cache = StaticCache(text_config, max_cache_len=length)
            causal_lm._previous_max_cache_length = length  # transformers' is at least as long
        if (
            config.get_generation_mode(options.get("assistant_model")) not in MODES
            or config.prefill_chunk_size
            or not config.use_cache
            or not causal_lm._valid_auto_compile_criteria({"past_key_values": cache}, config)
        ):
            return {}
        rows = tokens.repeat_interleave(config.num_return_sequences or 1, dim=0)
        mask = options.get("attention_mask")
        if mask is not None:
            mask = mask.repeat_interleave(len(rows) // len(tokens), dim=0)
        return (
            settings if self._is_warm(rows, mask, length, settings) else {"disable_compile": True}
        )

    def _is_warm(
        self, tokens: Tensor, mask: Tensor | None, length: int, settings: Mapping[str, Any]
    ) -> bool:
        """Compile a step of the streams in use, if none was; False where it cannot be compiled."""
        active = streams_of(self).selection.current()
        key = (active, len(tokens), length)
        if key in self.steps.warm:
            return True
        p = 1 if active is None else active.num_streams
        _say(f"Compiling a step of P = {p} (batch {len(tokens)}, up to {length:,} tokens) ...")
        started = time.perf_counter()
        limits = {"max_new_tokens": WARM_UP, "min_new_tokens": WARM_UP, "do_sample": False}
        decode = partial(super().generate, inputs=tokens, attention_mask=mask, **limits)
        self.get_base_model()._previous_max_cache_length = length
        try:
            decode(**{**settings, "cache_implementation": "static"})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            decode(disable_compile=True)  # raises where it is not the compiler's fault
            if self.compiles:
                raise
            self.compiles = False
            reason = str(error).strip().partition("\n")[0]
            _say(
                f"It cannot be compiled here ({type(error).__name__}: {reason}); decoding goes on "
                "without. recycle.load(..., compile=False) does not try."
            )
            return False
        self.steps.warm.add(key)
        _say(f"Compiled in {time.perf_counter() - started:.0f} s.")
        return True


FamilyModel.__name__ = PeftModelForCausalLM.__name__  # transformers' pipelines know it by this


def _with(options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `generate` with further settings, in the one place where it takes them."""
    config = options.get("generation_config")
    if config is None:
        return {**options, **settings}
    config = copy.deepcopy(config)
    config.update(**settings)
    return {**options, "generation_config": config}


def _room(cache: StaticCache) -> int:
    """Tokens that a static cache can hold."""
    return max(getattr(layer, "max_cache_len", 0) for layer in cache.layers)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def cache_length(tokens: int, text_config: Any) -> int:
    """The length of a static cache for so many tokens: 256, 384, 512, 768, 1,024, …"""
    length = SHORTEST_CACHE
    while length < tokens:
        length += length // (3 if length % 3 == 0 else 2)
    window = getattr(text_config, "max_position_embeddings", None) or length
    return max(tokens, min(length, window))
