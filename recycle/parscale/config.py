"""The configuration of one ParScale adapter, saved as PEFT's `adapter_config.json`."""

from dataclasses import dataclass, field
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
    """

    task_type: str | None = field(default="CAUSAL_LM", metadata={"help": "The only one there is."})
    num_streams: int = field(default=4, metadata={"help": "Parallel streams P."})
    p_values: list[int] | None = field(default=None, metadata={"help": "Values of P it serves."})
    num_virtual_tokens: int = field(default=48, metadata={"help": "Prefix tokens of every stream."})
    smoothing: float = field(default=0.1, metadata={"help": "Floor of the aggregation weights."})
    init: str = field(default="text", metadata={"help": "'text' or 'random'."})
    start_token_ids: list[list[int]] | None = field(
        default=None,
        metadata={"help": "Token ids that the streams start from when init is 'text'."},
    )
    decoder: str | None = field(default=None, metadata={"help": "Found at injection."})
    hidden_size: int | None = field(default=None, metadata={"help": "Found at injection."})
    attention_shapes: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Found at injection."}
    )
    backbone_trained: bool = field(default=False, metadata={"help": "P = 1 is not offered."})
    backbone_dtype: str | None = field(default=None, metadata={"help": "Precision in training."})
    backbone_quantization: str | None = field(
        default=None, metadata={"help": "'nf4' or 'int8' in training."}
    )
    fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Identity of the backbone."}
    )
    # PEFT reads this field of every method; streams are placed by `attention_shapes`.
    target_modules = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PARSCALE
        self.p_values = sorted(self.p_values) if self.p_values else [self.num_streams]
        if self.num_streams < 1 or self.num_virtual_tokens < 1:
            raise ParScaleError(
                f"num_streams and num_virtual_tokens are at least 1, got {self.num_streams} and "
                f"{self.num_virtual_tokens}."
            )
        if self.p_values[-1] != self.num_streams or len(set(self.p_values)) != len(self.p_values):
            raise ParScaleError(
                f"p_values are distinct and end with num_streams, got p_values={self.p_values} and "
                f"num_streams={self.num_streams}. For example num_streams=8, p_values=[2, 4, 8]."
            )
        if self.p_values[0] < 1 or (self.p_values[0] == 1 and self.num_streams > 1):
            raise ParScaleError(
                f"p_values are at least 2, got {self.p_values}. P = 1 is the backbone itself and "
                "needs no aggregator."
            )
        if not 0 <= self.smoothing < 1:
            raise ParScaleError(f"smoothing lies in [0, 1), got {self.smoothing}.")
        if self.init not in ("text", "random"):
            raise ParScaleError(f"init is 'text' or 'random', got {self.init!r}.")
        if isinstance(self.start_token_ids, torch.Tensor):
            self.start_token_ids = self.start_token_ids.tolist()
        if self.start_token_ids is not None:
            lengths = [len(row) for row in self.start_token_ids]
            if lengths != [self.num_virtual_tokens] * self.num_streams:
                raise ParScaleError(
                    f"start_token_ids holds num_streams={self.num_streams} lists of "
                    f"num_virtual_tokens={self.num_virtual_tokens} token ids, got lists of lengths "
                    f"{lengths}."
                )
