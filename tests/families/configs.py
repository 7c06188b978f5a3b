"""Tiny random models of every causal-LM type that transformers knows.

from tests.families.configs import MODEL_TYPES, family_model
"""

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCAB_SIZE = 128
PAD_ID = 2
# For each type: 2 layers where nothing else is said, and every path through a layer that is long.
_LAYERS = dict.fromkeys(
    (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
        *("encoder_layers", "num_encoder_layers", "num_decoder_layers"),
    ),
    2,
)
_WIDTHS = dict.fromkeys(
    (
        *("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"),
        *("word_embed_proj_dim", "dim_model", "lru_width", "attention_hidden_size"),
        *("input_embedding_size", "output_embedding_size"),
    ),
    64,
)
_INNER = dict.fromkeys(
    (
        *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"),
        *("shared_intermediate_size", "d_inner", "expert_ffn_hidden_size", "intermediate_size_mlp"),
        *("moe_shared_expert_intermediate_size", "dense_intermediate_size"),
        *("shared_experts_intermediate_size", "feed_forward_size"),
    ),
    96,
)
_HEADS = dict.fromkeys(
    (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "attention_heads", "num_encoder_attention_heads"),
        *("num_decoder_attention_heads", "swa_num_attention_heads"),
    ),
    4,
)
_KV_HEADS = dict.fromkeys(
    ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"),
    2,
)
_EXPERTS = {
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "n_group", "topk_group"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
_MLA |= {"v_head_dim": 12, "index_head_dim": 16, "index_n_heads": 16, "index_topk": 64}
_RECURRENT = {
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 16, "chunk_size": 16},
    **{"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "mamba_ngroups": 1},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
    **{"linear_value_head_dim": 16, "linear_head_dim": 16, "linear_num_heads": 4},
    **{"mamba_dt_rank": 8, "time_step_rank": 8, "n_mamba_heads": 2},
}
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": PAD_ID,
    "head_dim": 16,
    "swa_head_dim": 16,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_seq_len": 512,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "decoder_start_token_id": 0,
}
SIZES: dict[str, Any] = {
    **_COMMON,
    **_LAYERS,
    **_WIDTHS,
    **_INNER,
    **_HEADS,
    **_KV_HEADS,
    **_EXPERTS,
    **_MLA,
    **_RECURRENT,
}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1}
_VISION |= {"num_attention_heads": 2, "num_heads": 2, "out_hidden_size": 64, "image_size": 28}
_ALL_HEADS = {"num_key_value_heads": 4}  # multi-head latent attention has as many as queries
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED_KV = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
# What a type needs beyond that. A part of its own gets the sizes of its `model_type`.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _ALL_HEADS,
    "axk2": _ALL_HEADS,
    "bailing_hybrid": _ALL_HEADS | {"mlp_layer_types": ["dense", "sparse"]},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
        "global_config": {"encoder_cross_output_size": 128},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "ffn_act_fn": {"name": "silu"}},
    },
    "deepseek_v2": _ALL_HEADS,
    "deepseek_v3": _ALL_HEADS,
    "deepseek_v32": _ALL_HEADS,
    "dots3_note": {
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"head_dim": 16, "adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _ALL_HEADS
    | {"n_group": 1, "topk_group": 1, "num_hidden_layers": 2}
    | {"head_dim": 24, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4}
    | {"swa_q_lora_rank": 24, "swa_kv_lora_rank": 16, "swa_head_dim": 24}
    | {"swa_qk_nope_head_dim": 16, "swa_v_head_dim": 12},
    "falcon_h1": {"mamba_d_ssm": 128},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma3": {"vision_config": _VISION | {"patch_size": 14}, "mm_tokens_per_image": 4},
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB_SIZE},
    "gemma3n_text": _SHARED_KV
    | {
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
        | {"vocab_size_per_layer_input": 0}
        | _SHARED_KV
        | {"num_kv_shared_layers": 4},
        "backbone_hidden_size": 64,
    },
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 16},
    },
    "gemma4_unified_assistant": {"text_config": _SHARED_KV, "backbone_hidden_size": 64},
    "glm4_moe_lite": _ALL_HEADS,
    "glm_moe_dsa": _ALL_HEADS,
    "got_ocr2": {"text_config": {"model_type": "qwen2"}, "vision_config": _VISION},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _ALL_HEADS | _HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": _ALL_HEADS | {"zero_expert_num": 2, "num_hidden_layers": 4, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": _ALL_HEADS,
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 64,
        **{"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": 64, "indexer_compress_ratio": 2},
    },
    "reformer": {
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [16, 32],
        "attn_layers": ["local", "lsh"],
    },
    "roc_bert": {
        "shape_embed_dim": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 16,
    },
    "xlstm": {"hidden_size": 256, "embedding_dim": 256, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "youtu": _ALL_HEADS,
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def _fields(config_class: type[PretrainedConfig]) -> set[str]:
    return set(inspect.signature(config_class.__init__).parameters)


def _sizes(config_class: type[PretrainedConfig], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that make it tiny; `given` win, parts are merged."""
    fields = _fields(config_class)
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    if "layer_types" in fields:
        sizes |= _layers(config_class)
    sizes |= given
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        part_given = given.get(name, {})
        if part_given is not None and name in fields:
            model_type = part_given.get("model_type") or getattr(part, "model_type", "")
            more = OVERRIDES.get(model_type, {}) | part_given
            sizes[name] = _sizes(CONFIG_MAPPING[model_type], more) if model_type else part_given
    return sizes


def _layers(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """One layer of each kind that the type has by default, and two at least."""
    kinds = list(dict.fromkeys(config_class().layer_types or []))
    kinds = kinds * 2 if len(kinds) == 1 else kinds
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)} if kinds else {}


def family_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """A tiny configuration of a model type; `overrides` are fields of its class."""
    return AutoConfig.for_model(
        model_type, **_sizes(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}) | overrides)
    )


def family_model(
    model_type: str, attn_implementation: str | None = None, **overrides: Any
) -> PreTrainedModel:
    """A tiny random causal LM in float32 and eval mode, the same for the same arguments."""
    config = family_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.eval()
