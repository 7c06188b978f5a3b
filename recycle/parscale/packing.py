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


def may_be_packed(inputs: dict[str, Any]) -> bool:
    """Whether the rows of a decoder's inputs may hold several sequences each.

    A step of decoding never does, nor what has a mask. Compiled code cannot look at the position
    ids, so there packed rows take `use_cache=False`.

    Raises:
        ParScaleError: They do, with nothing that tells them apart.
    """
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if inputs.get("cu_seq_lens_q") is not None and (positions is None or mask is not None):
        raise ParScaleError(
            "Sequences packed into one row are told apart by position_ids that start again with "
            "each, without an attention_mask; got cu_seq_lens_q with "
            f"{'no position_ids' if positions is None else 'an attention_mask'}. Take them from "
            "transformers' DataCollatorWithFlattening(return_position_ids=True)."
        )
    if torch.compiler.is_compiling() or mask is not None or not isinstance(positions, Tensor):
        return False
    return positions.ndim == 2 and positions.shape[1] > 1


def starts_again(positions: Tensor) -> bool:
    """Whether position ids [B, S] start again within a row. Waits for the device."""
    return bool((positions[:, 1:] <= positions[:, :1]).any())


@torch.no_grad()
def keeps_sequences_apart(decoder: PreTrainedModel, device: torch.device) -> bool:
    """Whether a backbone heeds position ids that start again, found by running it on few tokens."""
    length = _PROBE_LENGTH
    second = torch.arange(2, 2 + length, device=device)
    tokens = torch.stack([torch.cat([torch.full_like(second, x), second]) for x in (0, 1)])
    positions = torch.arange(length, device=device).repeat(2, 2)  # [2, 2 * length]
    with eval_mode(decoder):
        # Past the hooks: a pass that has some of its own is about to begin.
        hidden = decoder.forward(input_ids=tokens, position_ids=positions, use_cache=False)[0]
    one, other = hidden[:, length:]  # the same sequence, after another first one
    # Only rounding may differ, in bfloat16 too; what is seen changes far more.
    return bool((one - other).abs().max() <= 1e-2 * one.abs().max())
