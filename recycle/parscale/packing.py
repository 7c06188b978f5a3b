"""Several sequences packed into one row, told apart by position ids that start again.

transformers keeps such sequences apart where there is no mask and no cache, and in the model types
whose mask is made from the position ids. Everywhere else they would silently see each other.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .decoder import eval_mode
from .errors import ParScaleError

_PROBE_LENGTH = 16  # long enough for attention that compresses groups of tokens


def is_packed(inputs: dict[str, Any]) -> bool:
    """Whether the rows of a decoder's inputs hold several sequences each.

    Compiled code cannot look at the position ids, so there packed rows take `use_cache=False`.

    Raises:
        ParScaleError: They do, and the sequences would see each other.
    """
    positions, mask, cache = (
        inputs.get(name) for name in ("position_ids", "attention_mask", "past_key_values")
    )
    if inputs.get("cu_seq_lens_q") is not None and (positions is None or mask is not None):
        raise ParScaleError(
            "Sequences packed into one row are told apart by position_ids that start again with "
            "each, without an attention_mask; got cu_seq_lens_q with "
            f"{'no position_ids' if positions is None else 'an attention_mask'}. Take them from "
            "transformers' DataCollatorWithFlattening(return_position_ids=True)."
        )
    if torch.compiler.is_compiling() or mask is not None:
        return False
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] < 2:
        return False  # a step of decoding, too, which must not wait for the device
    if not (positions[:, 1:] <= positions[:, :1]).any():
        return False
    if cache is not None and cache.get_seq_length():  # such as branches after one beginning
        return False
    if cache is not None or inputs.get("use_cache"):
        raise ParScaleError(
            "Sequences packed into one row (position_ids that start again) see each other where "
            "there is a cache. Pass use_cache=False and no past_key_values."
        )
    return True


@torch.no_grad()
def keeps_sequences_apart(decoder: PreTrainedModel, device: torch.device) -> bool:
    """Whether a backbone heeds position ids that start again, found by running it on few tokens."""
    length = _PROBE_LENGTH
    second = torch.arange(2, 2 + length, device=device)
    tokens = torch.stack([torch.cat([torch.full_like(second, x), second]) for x in (0, 1)])
    positions = torch.arange(length, device=device).repeat(2, 2)  # [2, 2 * length]
    with eval_mode(decoder):
        hidden = decoder(input_ids=tokens, position_ids=positions, use_cache=False)[0]
    one, other = hidden[:, length:]  # the same sequence, after another first one
    # Only rounding may differ, in bfloat16 too; what is seen changes far more.
    return bool((one - other).abs().max() <= 1e-2 * one.abs().max())
