"""The dynamic weighted sum over the streams' final hidden states, one for each value of P that an adapter serves.

Dimensions: B batch, P streams, S sequence, D hidden size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Aggregator(nn.Module):
    """`w = softmax(Linear(D→P)(SiLU(Linear(P·D→D)(concat h_i))))`, `w ← w(1-ε) + ε/P`, `h = Σ w_i h_i`.

    For every head P > 1 it holds `p{P}_hidden_weight [D, P*D]`, `p{P}_hidden_bias [D]`, `p{P}_output_weight [P, D]` and
    `p{P}_output_bias [P]` in float32, with the concatenation in stream-major order (`i*D + d`). One stream needs none.

    Source: arXiv 2505.10475 §2; upstream's `model.aggregate_layer`, whose concatenation has the stream innermost.

    Args:
        hidden_size: D.
        heads: The values of P.
        smoothing: ε.
        device: Where the parameters lie.
    """

    def __init__(
        self, hidden_size: int, heads: list[int], smoothing: float, device: torch.device
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        for p in heads:
            if p > 1:
                hidden = nn.Linear(p * hidden_size, hidden_size, device=device, dtype=torch.float32)
                output = nn.Linear(hidden_size, p, device=device, dtype=torch.float32)
                self.register_parameter(f"p{p}_hidden_weight", hidden.weight)
                self.register_parameter(f"p{p}_hidden_bias", hidden.bias)
                self.register_parameter(f"p{p}_output_weight", output.weight)
                self.register_parameter(f"p{p}_output_bias", output.bias)

    @torch.no_grad()
    def start_uniform(self) -> None:
        """Set the last layers to zero, so that every stream weighs 1/P."""
        for name, parameter in self.named_parameters():
            if "_output_" in name:
                parameter.zero_()

    def weights(self, hidden: Tensor) -> Tensor:
        """Weights `[B, P, S, 1]` in float32 of the streams in `hidden` `[B, P, S, D]`; they sum to one over P."""
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
