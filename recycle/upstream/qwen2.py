"""A backbone's config.json as upstream's code reads it: a Qwen2 of transformers 4.51.

Llama computes what Qwen2 does, but for biases of the queries, keys and values, which may be zero.
What upstream's code would compute in another way is refused.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from .tensors import CheckpointError

CLASSES = {"qwen2": Qwen2Config, "llama": LlamaConfig}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
UPSTREAM = {
    "model_type": "qwen2_parscale",
    "architectures": ["Qwen2ParScaleForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_qwen2_parscale.Qwen2ParScaleConfig",
        "AutoModelForCausalLM": "modeling_qwen2_parscale.Qwen2ParScaleForCausalLM",
    },
}
VERSION = "4.51.3"  # of transformers, which upstream's code runs with and this format is of
# What Qwen2 of 4.51 has under the same name, or is written anew below.
_KEYS = Qwen2Config.__annotations__.keys() - {"layer_types", "rope_parameters"}


def upstream_config(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """A backbone's config.json in upstream's format, without the keys of the streams.

    Args:
        raw: Content of the backbone's config.json, as any version of transformers writes it.
        where: Name of the backbone, for errors.

    Raises:
        CheckpointError: Upstream's code does not compute this model; names every reason.

    Source: upstream's configuration_qwen2_parscale.py; `Qwen2Config` and the rotary embeddings of
    transformers 4.51.
    """
    model_type = raw.get("model_type")
    if model_type not in CLASSES:
        raise CheckpointError(
            f"{where} is a model of type {model_type!r}, which upstream's code cannot compute; it "
            f"takes a backbone of type {' or '.join(CLASSES)}. Use this adapter with recycle.load, "
            "or recycle a model of such a type."
        )
    whole = CLASSES[model_type].from_dict(deepcopy(raw))
    rope = whole.rope_parameters or {}
    reasons = [*_reasons(raw, whole), *_rope_reasons(rope, whole.max_position_embeddings)]
    if reasons:
        raise CheckpointError(
            f"{where} cannot be computed by upstream's code, which is of Qwen2: "
            f"{'; '.join(reasons)}. Use this adapter with recycle.load."
        )
    config = {key: raw.get(key, getattr(whole, key, None)) for key in _KEYS}
    config = {key: value for key, value in config.items() if value is not None or key in raw}
    config["num_key_value_heads"] = whole.num_key_value_heads
    config |= {
        "max_window_layers": raw.get("max_window_layers", whole.num_hidden_layers),
        "use_sliding_window": False,
        "sliding_window": raw.get("sliding_window"),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": _rope_scaling(rope, whole.max_position_embeddings),
        "torch_dtype": raw.get("torch_dtype") or raw.get("dtype"),
        "transformers_version": VERSION,
    }
    if str(raw.get("transformers_version")).startswith("4."):
        config["transformers_version"] = raw["transformers_version"]
    return dict(sorted(config.items())) | UPSTREAM


def _reasons(raw: dict[str, Any], whole: PretrainedConfig) -> Iterator[str]:
    head_dim, rest = divmod(whole.hidden_size, whole.num_attention_heads)
    expected: dict[str, Any] = {
        "attention_bias": (False, "it adds a bias to queries, keys and values, and no other"),
        "mlp_bias": (False, "its feed-forward layers have no bias"),
        "head_dim": (head_dim, "its heads share the hidden size"),
        "hidden_act": ("silu", "the only activation of Qwen2"),
        "quantization_config": (None, "it copies weights as they are; name the model unquantised"),
    }
    for key, (value, why) in expected.items():
        if raw.get(key) not in (value, None):
            yield f"{key} is {raw[key]!r}, and must be {value!r}: {why}"
    if rest:
        yield (
            f"hidden_size is {whole.hidden_size}, and must be a multiple of num_attention_heads, "
            f"{whole.num_attention_heads}"
        )
    if set(getattr(whole, "layer_types", None) or ()) - {"full_attention"}:
        yield (
            "use_sliding_window is true, and must be false: under eager and sdpa it puts the "
            "window on all layers"
        )


def _rope_reasons(rope: dict[str, Any], positions: int) -> Iterator[str]:
    kind = rope.get("rope_type")
    if kind not in ROPE_TYPES or "rope_theta" not in rope:
        yield f"the rotary embedding is of type {kind!r}, and must be one of {list(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor") not in (None, 1):
        yield f"partial_rotary_factor is {rope['partial_rotary_factor']}, and must be 1"
    if kind != "yarn":
        return
    if not rope.get("truncate", True):
        yield "truncate of the yarn scaling is false, and must be true"
    original = rope["original_max_position_embeddings"]
    if positions not in (original, rope["factor"] * original):
        yield (
            f"the yarn scaling's factor is {rope['factor']}, and it takes "
            f"max_position_embeddings / original_max_position_embeddings instead, {positions} / "
            f"{original}"
        )


def _rope_scaling(rope: dict[str, Any], positions: int) -> dict[str, Any] | None:
    """What transformers 4.51 keeps beside `rope_theta`; None is the rotary embedding unscaled."""
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "type")}
    scaling.pop("partial_rotary_factor", None)
    if scaling["rope_type"] == "default":
        return None
    if scaling["rope_type"] == "yarn" and scaling["original_max_position_embeddings"] == positions:
        # 4.51 takes the factor from the ratio of the two, unless the original is left out.
        del scaling["original_max_position_embeddings"]
    return scaling
