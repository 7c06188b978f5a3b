"""Log-probabilities of a text under several P, without holding the logits of every position.

Dimensions: B blocks, S tokens of a block, V vocabulary, |P| values of P at once.
"""

from functools import cached_property
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from trl.trainer import add_fused_lm_head

from recycle.data import IGNORED
from recycle.parscale import ActiveStreams, choose_streams

FEW_LOGITS = 2**26  # 256 MiB in float32
PROBE = 64  # tokens
# Of a log-probability, in the mean: what rounding moves, while another head moves it by nats.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class OutputHead:
    """The output head of a model; a context manager, which takes it off again.

    Few logits come from the model's own head. Where they are many, TRL's fused head computes them
    tile by tile, and again in the backward pass: on a CPU that takes two to three times as long
    (float32 and bfloat16, 256 to 1,024 tokens of 49,152 logits). It takes a head for one matrix
    with a bias and a scale, below a `base_model` that is the decoder. Some model types have more
    in between (ModernBERT's decoder, BERT and its like), or no such `base_model` (Llama 4), and
    would get another loss: the two are compared, and where they differ the own head does it all.

    Args:
        model: A causal LM, or a PEFT model of one. Inside the `with` block it has TRL's `forward`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model

    def __enter__(self) -> Self:
        add_fused_lm_head(self.causal_lm)
        return self

    def __exit__(self, *error: object) -> None:
        self.causal_lm.__dict__.pop("forward")

    def log_probs(
        self,
        active: ActiveStreams | None,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities of the labels, in float32.

        Args:
            active: The streams to run; None is the backbone, as one value of P.
            input_ids: `[B, S]`.
            labels: `[B, S]`; what position s predicts is label s + 1. Where it is -100, the
                log-probability is 0.
            position_ids: `[B, S]`, that start again with each text where several are packed into a
                row.

        Returns:
            `[|P|, B, S - 1]`, one for each of `active.p_values`; then, where `active.apart`, those
            that each stream alone would give.
        """
        num_p = 1 if active is None else active.num_outputs
        inputs = {"input_ids": input_ids}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        with choose_streams(self.model, active):
            if num_p * input_ids.numel() * self._vocabulary <= FEW_LOGITS:
                return self._own(inputs, labels, num_p)
            if self.fused:
                found = self._fused(inputs, labels.repeat(num_p, 1))
                return found.view(num_p, len(input_ids), -1)
            if torch.is_grad_enabled():
                return self._own(inputs, labels, num_p)
            # Row by row: a row's logits [|P|, S, V] are all that is held.
            rows = range(len(input_ids))
            each = [({k: x[i : i + 1] for k, x in inputs.items()}, labels[i : i + 1]) for i in rows]
            return torch.cat([self._own(*row, num_p) for row in each], dim=1)

    def _fused(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        output = self.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        log_probs: Tensor = output.log_probs
        return log_probs.float()

    def _own(self, inputs: dict[str, Tensor], labels: Tensor, num_p: int) -> Tensor:
        logits = self.model(**inputs, use_cache=False).logits  # [|P|*B, S, V]
        targets = labels.repeat(num_p, 1)[:, 1:]
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        return -losses.view(num_p, len(labels), -1)

    @property
    def _vocabulary(self) -> int:
        size: int = self.causal_lm.get_input_embeddings().num_embeddings
        return size

    @cached_property
    @torch.no_grad()
    def fused(self) -> bool:
        """Whether TRL's head gives the log-probabilities of the model's own."""
        if self.causal_lm.base_model is self.causal_lm:
            return False
        ids = (torch.arange(PROBE, device=self.model.device) * 7 % self._vocabulary).unsqueeze(0)
        training = self.model.training
        self.model.eval()
        with choose_streams(self.model, None):
            fused, own = (
                self._fused({"input_ids": ids}, ids),
                self._own({"input_ids": ids}, ids, 1)[0],
            )
        self.model.train(training)
        return bool((fused - own).abs().mean() < TOLERANCE[self.model.dtype])
