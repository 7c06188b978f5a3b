"""The configuration of one ParScale adapter, saved as PEFT's `adapter_config.json`."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftType

from .errors import ParScaleError


@dataclass
class ParScaleConfig(PeftConfig):
    """Configuration of a ParScale adapter (arXiv 2505.10475).

    Args:
        num_streams: Parallel streams P whose prefixes the adapter holds. One stream is plain prefix
            tuning, the control of a comparison.
        p_values: The values of P that the adapter serves, each with an aggregator of its own over
            the first streams. The largest is `num_streams`. `None` stands for `[num_streams]`.
        num_virtual_tokens: Learned prefix tokens n of every stream.
        smoothing: ε in `w(1 - ε) + ε/P`, the floor of the aggregation weights.
        init: `"text"` starts stream i from the keys and values that the backbone computes on
            `start_token_ids[i]`; `"random"` from a normal distribution. Loading an adapter
            overwrites either.
        start_token_ids: `[num_streams][num_virtual_tokens]` token ids of real text, one text for
            each stream; a tensor of that shape is taken as well.
        decoder: Name of the decoder inside the causal LM; found at injection.
        hidden_size: Width D of the decoder's output; found at injection.
        attention_shapes: `[H, Dk, Dv]` (key-value heads, key and value head size) of every
            attention module with a prefix, by its name; found at injection with a two-token pass.
        backbone_trained: The backbone was trained together with the streams, so P = 1 is not the
            original model.
        backbone_dtype: Number format that the backbone computed in when the adapter was trained.
        backbone_quantization: `"nf4"` or `"int8"` where its weights were quantised then.
        fingerprint: What identifies the backbone, see `recycle.backbone.fingerprint`.
        adapter_sha256: Of the LoRA's weights that the backbone was adapted with before.
        weights: A sample of the weights that the streams stand on, see `recycle.backbone.sample`.
    """

    task_type: str | None = "CAUSAL_LM"  # the only one there is
    num_streams: int = 4
    p_values: list[int] | None = None
    num_virtual_tokens: int = 48
    smoothing: float = 0.1
    init: str = "text"
    start_token_ids: list[list[int]] | None = None
    decoder: str | None = None
    hidden_size: int | None = None
    attention_shapes: dict[str, list[int]] | None = None
    backbone_trained: bool = False
    backbone_dtype: str | None = None
    backbone_quantization: str | None = None
    fingerprint: dict[str, Any] | None = None
    adapter_sha256: str | None = None
    weights: dict[str, dict[str, list[Any]]] | None = None
    # PEFT reads this field of every method; streams are placed by `attention_shapes`.
    target_modules = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PARSCALE
        self.p_values = sorted(self.p_values) if self.p_values else [self.num_streams]
        if isinstance(self.start_token_ids, torch.Tensor):
            self.start_token_ids = self.start_token_ids.tolist()
        p, n, p_values = self.num_streams, self.num_virtual_tokens, self.p_values
        lengths = [n] * p if self.start_token_ids is None else [*map(len, self.start_token_ids)]
        rules = (
            (
                p >= 1 and n >= 1,
                f"num_streams and num_virtual_tokens are at least 1, got {p} and {n}.",
            ),
            (
                p_values[-1] == p and len(set(p_values)) == len(p_values),
                f"p_values are distinct and end with num_streams, got {p_values=} and "
                f"num_streams={p}. For example num_streams=8, p_values=[2, 4, 8].",
            ),
            (
                p_values[0] >= 2 or p_values == [1],
                f"p_values are at least 2, got {p_values}. P = 1 is the backbone itself and needs "
                "no aggregator.",
            ),
            (0 <= self.smoothing < 1, f"smoothing lies in [0, 1), got {self.smoothing}."),
            (self.init in ("text", "random"), f"init is 'text' or 'random', got {self.init!r}."),
            (
                lengths == [n] * p,
                f"start_token_ids holds num_streams={p} lists of num_virtual_tokens={n} token ids, "
                f"got lists of lengths {lengths}.",
            ),
        )
        for holds, message in rules:
            if not holds:
                raise ParScaleError(message)
