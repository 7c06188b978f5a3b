"""What each stream does: whether streams err on the same tokens, and how much each of them weighs.

Dimensions: B documents, P streams, S tokens of a block, |P| values of P at once, N predicted tokens
of all documents.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from recycle import world
from recycle.data import IGNORED
from recycle.parscale import ActiveStreams, streams_of
from recycle.results import StreamUse

from .head import OutputHead


class StreamWatch:
    """An output head that keeps what each stream does in the passes it serves.

    The decoder runs no more often for it: the streams' own losses cost the head's time alone.
    """

    def __init__(self, head: OutputHead) -> None:
        self.head = head
        self.model = head.model
        # By adapter, and by adapter and P; a tensor [P, N of the pass] for each pass.
        self._losses: dict[str, list[Tensor]] = defaultdict(list)
        self._weights: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def log_probs(self, active: ActiveStreams | None, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities `[|P|, B, S - 1]` of the labels, as `OutputHead.log_probs` has them."""
        if active is None or active.num_streams == 1:
            return self.head.log_probs(active, input_ids, labels)
        weights: dict[int, list[Tensor]] = defaultdict(list)  # a head may go row by row

        def keep(aggregator: nn.Module, inputs: tuple[Tensor]) -> None:
            (hidden,) = inputs  # [B, P, S, D]
            if hidden.shape[1] > 1:
                weights[hidden.shape[1]].append(aggregator.weights(hidden))  # type: ignore

        apart = ActiveStreams(active.adapter, active.num_streams, active.p_values, apart=True)
        aggregator = streams_of(self.model).parscale_aggregator[active.adapter]
        with aggregator.register_forward_pre_hook(keep):
            found = self.head.log_probs(apart, input_ids, labels)  # [|P| + P, B, S - 1]
        merged, alone = found.tensor_split([len(active.p_values)])
        predicted = labels[:, 1:] != IGNORED  # [B, S - 1]
        self._losses[active.adapter].append(-alone[:, predicted].cpu())
        for p, parts in weights.items():
            by_stream = torch.cat(parts)[:, :, :-1, 0].transpose(0, 1)  # [P, B, S - 1]
            self._weights[active.adapter, p].append(by_stream[:, predicted].cpu())
        return merged

    def gather(self, passes: int) -> None:
        """Bring together what the processes kept of so many passes of each adapter."""
        for kept in (self._losses, self._weights):
            for key, mine in kept.items():
                kept[key] = world.in_order(mine, passes)  # type: ignore[index]

    def use(self, active: ActiveStreams | None) -> StreamUse | None:
        """What the streams of one P did in all passes so far; None of one stream."""
        if active is None or active.num_streams == 1:
            return None
        p = active.num_streams  # in nested training, the first streams of the largest P
        losses = torch.cat(self._losses[active.adapter], dim=1)[:p].double()
        weights = torch.cat(self._weights[active.adapter, p], dim=1).double()
        pairs = torch.triu_indices(p, p, offset=1)
        correlation = losses.corrcoef()[pairs[0], pairs[1]].mean().item()
        return StreamUse(
            weights=tuple(weights.mean(dim=1).tolist()),
            entropy=torch.special.entr(weights).sum(dim=0).mean().item(),
            error_correlation=correlation if math.isfinite(correlation) else None,
        )
