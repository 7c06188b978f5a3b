"""The dynamic weighted sum over the streams' final hidden states, one for each P of an adapter.

Dimensions: B batch, P streams, S sequence, D hidden size, |P| values of P at once.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .active import ActiveStreams


class Aggregator(nn.Module):
    """Merge streams: `w = softmax(Linear(D→P)(SiLU(Linear(P·D→D)(concat h_i))))`, `h = Σ w_i h_i`.

    In between, the weights are smoothed: `w ← w(1-ε) + ε/P`. For every P > 1 it holds, in
    float32, `p{P}_hidden_weight [D, P*D]`, `p{P}_hidden_bias [D]`, `p{P}_output_weight [P, D]` and
    `p{P}_output_bias [P]`. The concatenation is stream-major (`i*D + d`). One stream needs none.

    Source: arXiv 2505.10475 §2; upstream's `model.aggregate_layer`, whose concatenation has the
    stream innermost.

    Args:
        hidden_size: D.
        p_values: The values of P.
        smoothing: ε.
        device: Where the parameters lie.
    """

    def __init__(
        self, hidden_size: int, p_values: list[int], smoothing: float, device: torch.device
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        for p in p_values:
            if p > 1:
                self._add(f"p{p}_hidden", p * hidden_size, hidden_size, device)
                self._add(f"p{p}_output", hidden_size, p, device)

    def _add(self, name: str, inputs: int, outputs: int, device: torch.device) -> None:
        linear = nn.Linear(inputs, outputs, device=device, dtype=torch.float32)
        for kind, parameter in linear.named_parameters():
            self.register_parameter(f"{name}_{kind}", parameter)

    @torch.no_grad()
    def start_uniform(self) -> None:
        """Set the last layers to zero, so that every stream weighs 1/P."""
        for name, parameter in self.named_parameters():
            if "_output_" in name:
                parameter.zero_()

    def weights(self, hidden: Tensor) -> Tensor:
        """Weights `[B, P, S, 1]` in float32 of the streams `[B, P, S, D]`; over P they sum to 1."""
        p = hidden.shape[1]
        concatenation = hidden.transpose(1, 2).flatten(2)  # [B, S, P*D]
        inner = F.silu(self._linear(f"p{p}_hidden", concatenation))
        weights = torch.softmax(self._linear(f"p{p}_output", inner).float(), dim=-1)  # [B, S, P]
        weights = weights * (1 - self.smoothing) + self.smoothing / p
        return weights.transpose(1, 2).unsqueeze(-1)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return F.linear(x, weight.to(x), bias.to(x))

    def forward(self, hidden: Tensor) -> Tensor:
        """Merge streams `[B, P, S, D]` into `[B, S, D]` of the same dtype."""
        if hidden.shape[1] == 1:
            return hidden[:, 0]
        return (self.weights(hidden) * hidden).sum(dim=1).to(hidden.dtype)


def merge(aggregator: nn.Module, hidden: Tensor, active: ActiveStreams) -> Tensor:
    """Merge streams `[B, P, S, D]` for each P of a pass, stacked along the batch: `[|P|*B, S, D]`.

    The first P comes first; then, where `active.apart`, each stream.
    """
    parts = [aggregator(hidden[:, :p]) for p in active.p_values]
    return torch.cat([*parts, *hidden.unbind(1)] if active.apart else parts)
