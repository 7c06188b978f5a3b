"""The loss of every document under every model of the table.

Dimensions: B documents, S tokens of a block, |P| values of P at once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recycle import world
from recycle.data import IGNORED, Document
from recycle.parscale import ActiveStreams

from .diversity import StreamWatch
from .head import OutputHead
from .passes import Pass


@torch.no_grad()
def document_losses(
    head: OutputHead | StreamWatch,
    passes: Sequence[Pass],
    documents: Sequence[Document],
    batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, list[float]]:
    """Mean loss of every document's block, in nats per predicted token.

    Args:
        head: Of the model, which is in eval mode.
        passes: What to evaluate.
        documents: One block each, of any length: attention is causal, so that shorter ones can be
            padded on the right.
        batch_size: Documents in a pass.
        advance: Called with the stream-tokens done.

    Returns:
        Losses by the row's name, in the documents' order.
    """
    losses: dict[str, list[float]] = {name: [] for _, names in passes for name in names}
    device = head.model.device
    starts = range(0, len(documents), batch_size)
    for active, names in passes:

        def measured(start: int, active: ActiveStreams | None = active) -> list[list[float]]:
            batch = documents[start : start + batch_size]
            ids = _padded([document.input_ids for document in batch], 0).to(device)
            labels = _padded([document.labels for document in batch], IGNORED).to(device)
            log_probs = head.log_probs(active, ids, labels)  # [|P|, B, S - 1]
            means = -log_probs.sum(dim=-1) / (labels[:, 1:] != IGNORED).sum(dim=-1)
            tokens = sum(len(document.input_ids) for document in batch)
            advance(tokens * (1 if active is None else active.num_streams) * world.size())
            found: list[list[float]] = means.tolist()  # of each P and document
            return found

        for found in world.share(starts, measured):
            for name, row in zip(names, found, strict=True):
                losses[name] += row
    if isinstance(head, StreamWatch):
        head.gather(len(starts))
    return losses


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
