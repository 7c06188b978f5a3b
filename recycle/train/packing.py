"""Rows of one text each: transformers need not ask the GPU whether they are packed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import masking_utils


def _nothing_packed(position_ids: Tensor) -> None:
    """No sequence of a row begins after its first token."""


@contextmanager
def one_text_a_row() -> Iterator[None]:
    """Let transformers make masks for rows that hold one text each.

    It would look at the positions in every pass without a cache, and so wait for all that the GPU
    has still to do.
    """
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _nothing_packed
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look
