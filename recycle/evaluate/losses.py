"""The loss of every document under every model of the table.

Dimensions: B documents, S tokens of a block, |P| values of P at once.
"""

from collections.abc import Callable, Sequence

import torch

from recycle.data import IGNORED, Document

from .head import OutputHead
from .passes import Pass


@torch.no_grad()
def document_losses(
    head: OutputHead,
    passes: Sequence[Pass],
    documents: Sequence[Document],
    batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, list[float]]:
    """Mean loss of every document's block, in nats per predicted token.

    Args:
        head: Of the PEFT model, which is in eval mode.
        passes: What to evaluate.
        documents: One block each.
        batch_size: Documents in a pass.
        advance: Called with the stream-tokens done.

    Returns:
        Losses by the row's name, in the documents' order.
    """
    losses: dict[str, list[float]] = {name: [] for _, names in passes for name in names}
    device = head.model.device
    for active, names in passes:
        for start in range(0, len(documents), batch_size):
            batch = documents[start : start + batch_size]
            ids = torch.tensor([document.input_ids for document in batch], device=device)
            labels = torch.tensor([document.labels for document in batch], device=device)
            log_probs = head.log_probs(active, ids, labels)  # [|P|, B, S - 1]
            means = -log_probs.sum(dim=-1) / (labels[:, 1:] != IGNORED).sum(dim=-1)
            for name, row in zip(names, means.tolist(), strict=True):
                losses[name] += row
            advance(ids.numel() * (1 if active is None else active.num_streams))
    return losses
