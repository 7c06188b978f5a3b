"""Log-probabilities of a text under several P, without holding the logits of every position.

Dimensions: B blocks, S tokens of a block, V vocabulary, |P| values of P at once.
"""

from functools import cached_property
from typing import Any, Self

import torch
from peft import PeftModelForCausalLM
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
    """The output head of a model with streams; a context manager, which takes it off again.

    Few logits come from the model's own head. Where they are many, TRL's fused head computes them
    tile by tile, and again in the backward pass: on a CPU that takes two to three times as long
    (float32 and bfloat16, 256 to 1,024 tokens of 49,152 logits). It takes a head for one matrix
    with a bias and a scale, below a `base_model` that is the decoder. Some model types have more
    in between (ModernBERT's decoder, BERT and its like), or no such `base_model` (Llama 4), and
    would get another loss: the two are compared, and where they differ the own head does it all.

    Args:
        model: A PEFT model. Inside the `with` block its backbone has TRL's `forward`.
    """

    def __init__(self, model: PeftModelForCausalLM) -> None:
        self.model = model

    def __enter__(self) -> Self:
        add_fused_lm_head(self.model.get_base_model())
        return self

    def __exit__(self, *error: object) -> None:
        self.model.get_base_model().__dict__.pop("forward")

    def log_probs(self, active: ActiveStreams | None, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities of the labels, in float32.

        Args:
            active: The streams to run; None is the backbone, as one value of P.
            input_ids: `[B, S]`.
            labels: `[B, S]`; what position s predicts is label s + 1. Where it is -100, the
                log-probability is 0.

        Returns:
            `[|P|, B, S - 1]`, one for each of `active.p_values`.
        """
        num_p = 1 if active is None else len(active.p_values)
        with choose_streams(self.model, active):
            if num_p * input_ids.numel() * self._vocabulary <= FEW_LOGITS:
                return self._own(input_ids, labels, num_p)
            if self.fused:
                found = self._fused(input_ids, labels.repeat(num_p, 1))
                return found.view(num_p, len(input_ids), -1)
            if torch.is_grad_enabled():
                return self._own(input_ids, labels, num_p)
            # Row by row: a row's logits [|P|, S, V] are all that is held.
            rows = zip(input_ids.split(1), labels.split(1), strict=True)
            return torch.cat([self._own(*row, num_p) for row in rows], dim=1)

    def _fused(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        model: Any = self.model
        output = model(input_ids=input_ids, labels=labels, use_cache=False, fused_lm_head=True)
        log_probs: Tensor = output.log_probs
        return log_probs.float()

    def _own(self, input_ids: Tensor, labels: Tensor, num_p: int) -> Tensor:
        logits = self.model(input_ids=input_ids, use_cache=False).logits  # [|P|*B, S, V]
        targets = labels.repeat(num_p, 1)[:, 1:]
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        return -losses.view(num_p, len(input_ids), -1)

    @property
    def _vocabulary(self) -> int:
        size: int = self.model.get_base_model().get_input_embeddings().num_embeddings
        return size

    @cached_property
    @torch.no_grad()
    def fused(self) -> bool:
        """Whether TRL's head gives the log-probabilities of the model's own."""
        causal_lm = self.model.get_base_model()
        if causal_lm.base_model is causal_lm:
            return False
        ids = (torch.arange(PROBE, device=self.model.device) * 7 % self._vocabulary).unsqueeze(0)
        training = self.model.training
        self.model.eval()
        with choose_streams(self.model, None):
            fused, own = self._fused(ids, ids), self._own(ids, ids, 1)[0]
        self.model.train(training)
        return bool((fused - own).abs().mean() < TOLERANCE[self.model.dtype])
