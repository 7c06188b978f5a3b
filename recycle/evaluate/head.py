"""Log-probabilities of a text under several P, without holding the logits of every position.

Dimensions: B blocks, S tokens of a block, T positions of a tile, D hidden size, V vocabulary, |P|
values of P at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recycle.cost.training import LOGITS
from recycle.data import IGNORED
from recycle.parscale import ActiveStreams, choose_streams, find_decoder, run_in_groups

TILE = LOGITS  # of a tile, 64 MiB in float32


class OutputHead:
    """Everything of a causal LM that comes after its decoder; a context manager.

    The decoder runs once and gives the hidden states of every P. The head then goes over them tile
    by tile: the model's own forward pass, with a decoder that does nothing but hand out the tile.
    So scales, caps and layers before the output matrix are part of it, whatever the model type.

    A log-probability depends on the hidden state of its own position only. Where the head does not
    learn, its gradient is therefore found at once with the logits, which are then dropped; the
    backward pass only multiplies it by what comes in. Where it learns, the backward pass computes
    each tile again.

    Every position is computed, also those whose label is -100: to leave them out the device would
    have to tell how many they are.

    Args:
        model: A causal LM, or a PEFT model of one. Inside the `with` block its `forward` also takes
            what `log_probs` asks for.
        streams_at_once: Streams that run together; None is all of them. See `parscale/groups.py`.
    """

    def __init__(self, model: Any, streams_at_once: int | None = None) -> None:
        self.model = model
        self.streams_at_once = streams_at_once
        self.causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.decoder = find_decoder(self.causal_lm)
        inside = set(self.decoder.modules())
        self._modules = [module for module in self.causal_lm.modules() if module not in inside]
        self._modules.append(self.causal_lm.get_output_embeddings())  # may be the decoder's own

    def __enter__(self) -> Self:
        self._own: Callable[..., Any] = self.causal_lm.forward
        self._replaced = _replaced(self.causal_lm, "forward", self._forward)
        self._replaced.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._replaced.__exit__(*error)

    def log_probs(
        self,
        active: ActiveStreams | None,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        through: nn.Module | None = None,
    ) -> Tensor:
        """Log-probabilities of the labels, in float32.

        Args:
            active: The streams to run; None is the backbone, as one value of P.
            input_ids: `[B, S]`.
            labels: `[B, S]`; what position s predicts is label s + 1. Where it is -100, the
                log-probability is 0.
            position_ids: `[B, S]`, that start again with each text where several are packed into a
                row.
            through: The module that is called: the model itself, or one that wraps it, such as
                torch's DistributedDataParallel.

        Returns:
            `[|P|, B, S - 1]`, one for each of `active.p_values`; then, where `active.apart`, those
            that each stream alone would give.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        with choose_streams(self.model, active):
            found: Tensor = (through or self.model)(**inputs, predicted=labels, streams=active)
        return found

    def _forward(
        self,
        *args: Any,
        predicted: Tensor | None = None,
        streams: ActiveStreams | None = None,
        **inputs: Any,
    ) -> Any:
        """The causal LM's forward pass: its own, or the log-probabilities of what is predicted."""
        if predicted is None:
            return self._own(*args, **inputs)
        at_once = self.streams_at_once
        if streams is None or at_once is None or streams.num_streams <= at_once:
            hidden = self._decode(inputs)
        else:
            hidden = run_in_groups(self.model, streams, at_once, self._decode, inputs)
        num_p = 1 if streams is None else streams.num_outputs
        labels = predicted[:, 1:]
        by_p = hidden[:, :-1].unflatten(0, (num_p, -1)).flatten(1, 2)  # [|P|, B * (S - 1), D]
        size = max(TILE // self._vocabulary, 1)
        parts = [
            self._tile(*tile)
            for each in by_p
            for tile in zip(each.split(size), labels.flatten().split(size), strict=True)
        ]
        return torch.cat(parts).view(num_p, *labels.shape)

    def _decode(self, inputs: dict[str, Any]) -> Tensor:
        """The decoder's final hidden states `[|P|*B, S, D]`; the head gets no position of them."""
        found: list[Tensor] = []

        def take(decoder: nn.Module, inputs: Any, output: Any) -> Any:
            self._output = type(output)
            found.append(output.last_hidden_state)
            return self._output(last_hidden_state=found[0][:, :0])

        with self.decoder.register_forward_hook(take):
            self._own(**inputs)
        return found[0]

    def _tile(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities `[T]` of labels `[T]` after hidden states `[T, D]`."""
        if torch.is_grad_enabled() and self._learns:
            found: Tensor = checkpoint(self._score, hidden, labels, use_reentrant=False)
        else:
            found = _Scored.apply(hidden, labels, self._score)
        return found

    def _score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """As `_tile`, with logits `[T, V]` in the graph."""
        output = self._output(last_hidden_state=hidden.unsqueeze(0))
        no_text = torch.zeros_like(labels).unsqueeze(0)  # the decoder's part, which does not run
        # No hook around the decoder runs: streams would multiply a tile, FSDP drop its plans.
        with _replaced(self.decoder, "_compiled_call_impl", lambda *args, **kwargs: output):
            logits = self._own(input_ids=no_text, use_cache=False).logits[0]
        return -F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")

    @property
    def _learns(self) -> bool:
        parameters = (x for module in self._modules for x in module.parameters(recurse=False))
        return any(x.requires_grad for x in parameters)

    @property
    def _vocabulary(self) -> int:
        size: int = self.causal_lm.get_input_embeddings().num_embeddings
        return size


class _Scored(torch.autograd.Function):
    """A function of a tile that keeps its gradient `[T, D]` in place of its logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, score: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return score(hidden, labels)
        tile = hidden.detach().requires_grad_()
        with torch.enable_grad():
            found = score(tile, labels)
            (slope,) = torch.autograd.grad(found.sum(), tile)
        ctx.save_for_backward(slope)
        return found.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradient.unsqueeze(1) * slope).to(slope.dtype), None, None


@contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A module with another `forward`, or `_compiled_call_impl`, which also takes its hooks' place.

    What is in that place on the instance comes back.
    """
    before = module.__dict__.get(name)
    module.__dict__[name] = function
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before
