"""The decoder inside a causal LM: where streams begin and end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .errors import UnsupportedModelError


def find_decoder(model: nn.Module) -> PreTrainedModel:
    """The decoder of a causal LM, the part before its output head.

    Args:
        model: A causal LM of transformers, also inside a PEFT model or any other wrapper.

    Raises:
        UnsupportedModelError: There is none, as a module of its own.
    """
    # Wrappers come before what they wrap, so this looks at few modules.
    causal_lm: Any = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if causal_lm is None:
        raise UnsupportedModelError(
            f"Streams enter a causal LM of transformers, and {type(model).__name__} holds none."
        )
    decoder = causal_lm.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # a head of that name
        decoder = causal_lm
    while decoder.get_output_embeddings() is not None:
        below = [child for child in decoder.children() if isinstance(child, PreTrainedModel)]
        if len(below) != 1:
            raise UnsupportedModelError(
                "Streams enter a decoder below the causal LM, before its output head; "
                f"{type(causal_lm).__name__} (model type {causal_lm.config.model_type!r}) has "
                f"{len(below)} models below {type(decoder).__name__}, and one is expected."
            )
        decoder = below[0]
    return decoder


@contextmanager
def eval_mode(decoder: nn.Module) -> Iterator[None]:
    """A decoder in eval mode, each of its modules as before afterwards."""
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
