"""What is found out about one model type: supported, refused, or broken in transformers itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from recycle.parscale import UnsupportedModelError
from recycle.parscale.decoder import find_decoder
from tests.families.checks import (
    LENGTH,
    check_attention,
    check_beams,
    check_cache,
    check_disabled,
    check_gradients,
    check_packing,
    check_padding,
    check_saved,
    check_start_is_of_the_text,
    check_static_cache,
    check_text_start,
    check_warm_cache,
    forward,
    stream_model,
    token_ids,
)
from tests.families.configs import family_model

SUPPORTED, REFUSED, BROKEN = "supported", "refused", "broken in transformers"
FAILED = "failed"  # none of the three: a defect of ours
PASSED = "passed"

# Why a start from a text is not the backbone conditioned on that text.
ABSOLUTE = "another function: there are no positions before 0"
RECURRENT = "another function: recurrent layers do not see it"
BIAS = "another function: attention has a bias that a prefix is not in"
NO_START = "refused: only init=random"
# Types with a bias in attention, by distance or by values, that a prefix has none of.
BIASED = {"doge", "inkling2_text", "inkling_text"}

# Not every backbone can do these, and what is said where it cannot.
OPTIONAL: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "warm cache": (check_warm_cache, "only token by token, in the backbone as well"),
    "packing": (check_packing, "no, nor in the backbone"),
}
# Run on the bare backbone as well: what it does wrong itself says nothing about its streams.
SHARED: dict[str, Callable[[nn.Module], None]] = {
    "cache": check_cache,
    "padding": check_padding,
    "beams": check_beams,
    "static cache": check_static_cache,
}


@dataclass(frozen=True)
class Verdict:
    """The state of a model type, why it is so, and what each check found."""

    state: str
    reason: str = ""
    checks: dict[str, str] = field(default_factory=dict)


def examine(model_type: str) -> Verdict:
    """Run every check on a tiny model of that type."""
    build = partial(family_model, model_type)
    try:
        backbone = build()
        forward(backbone, token_ids(2, LENGTH))
    except Exception as error:  # any: it is transformers' own
        return Verdict(BROKEN, f"forward: {_said(error)}")
    try:
        stream_model(build())
    except UnsupportedModelError as error:
        return Verdict(REFUSED, str(error))

    bare = {name: _outcome(check, build()) for name, check in SHARED.items()}
    absent: dict[str, str] = {}
    try:
        build(attn_implementation="sdpa")
    except ValueError:
        absent["attention"] = "transformers has no sdpa for it"
    else:
        bare["attention"] = _outcome(_check_attention, build, lambda model: model)
    wrong = {name: outcome for name, outcome in bare.items() if outcome != PASSED}
    if wrong:
        name = next(iter(wrong))
        return Verdict(BROKEN, f"{name}: {wrong[name]}", wrong)

    checks = {name: _outcome(check, stream_model(build())) for name, check in SHARED.items()}
    for name, (check, without) in OPTIONAL.items():
        if _outcome(check, build()) == PASSED:
            checks[name] = _outcome(check, stream_model(build()))
        else:
            absent[name] = without
    if "attention" in bare:
        checks["attention"] = _outcome(_check_attention, build, stream_model)
    checks["P = 1"] = _outcome(check_disabled, stream_model(build()), backbone)
    checks["gradients"] = _outcome(check_gradients, stream_model(build()))
    checks["saved"] = _outcome(check_saved, stream_model(build()), build)
    checks["text start"] = _text_start(model_type, backbone, build)
    fine = {PASSED, ABSOLUTE, RECURRENT, BIAS, NO_START}
    failed = {name: outcome for name, outcome in checks.items() if outcome not in fine}
    if failed:
        return Verdict(FAILED, f"{len(failed)} checks", failed)
    return Verdict(SUPPORTED, "", absent | checks)


def _text_start(
    model_type: str, backbone: PreTrainedModel, build: Callable[[], PreTrainedModel]
) -> str:
    """Whether a start from a text is the backbone conditioned on it; if not, why it cannot be."""
    outcome = _outcome(check_text_start, build)
    if outcome == PASSED:
        return PASSED
    if outcome.startswith(UnsupportedModelError.__name__):
        return NO_START
    taken = _outcome(check_start_is_of_the_text, build)
    if not outcome.startswith("CheckError: logits differ") or taken != PASSED:
        return f"{outcome}; {taken}"
    decoder = find_decoder(backbone)
    layers = DynamicCache(config=decoder.config).layers
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return RECURRENT
    if model_type in BIASED:
        return BIAS
    alibi = getattr(decoder.config, "alibi", False) or model_type == "bloom"
    if getattr(decoder.config, "rope_parameters", None) is None and not alibi:
        return ABSOLUTE
    return outcome


def _check_attention(
    build: Callable[..., PreTrainedModel], wrap: Callable[[PreTrainedModel], nn.Module]
) -> None:
    check_attention([wrap(build(attn_implementation=name)) for name in ("eager", "sdpa")])


def _outcome(check: Callable[..., None], *arguments: object) -> str:
    try:
        check(*arguments)
    except Exception as error:  # whatever goes wrong is what is to be told
        return _said(error)
    return PASSED


def _said(error: Exception) -> str:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) <= 160 else words[:157] + "..."
