"""The validation loss of what a training learns, and its weighted mean over P."""

from collections.abc import Sequence

from recycle.cost.shortage import enough_memory
from recycle.data import Document
from recycle.evaluate import OutputHead, Pass, document_losses
from recycle.evaluate.diversity import StreamWatch
from recycle.results import token_mean

from . import tracking
from .arguments import arithmetic
from .checkpoints import TrainingError
from .plan import TrainingPlan
from .shortage import in_validation


class Validation:
    """Validation documents, and how they are measured.

    Args:
        plan: The training's.
        documents: One block each.
        batch_size: Documents in a pass.
    """

    def __init__(self, plan: TrainingPlan, documents: Sequence[Document], batch_size: int) -> None:
        self.plan, self.documents, self.batch_size = plan, documents, batch_size

    def measure(self, head: OutputHead) -> tuple[dict[str, float], dict[str, float]]:
        """Mean loss of each row in nats per token, and what is tracked of it.

        Raises:
            TrainingError: Memory is too small.
        """
        plan, model = self.plan, head.model
        model.eval()
        watch = StreamWatch(head) if plan.tracking else None  # a longer pass of the head
        enough = enough_memory(
            TrainingError,
            f"validation of {plan.adapter!r}",
            lambda: in_validation(plan, model, self.batch_size),
        )
        with enough, arithmetic(plan, model.device):
            passes = [Pass(plan.active, list(plan.rows))]
            losses = document_losses(watch or head, passes, self.documents, self.batch_size)
        tokens_of = [document.predicted_tokens for document in self.documents]
        means = {name: token_mean(each, tokens_of) for name, each in losses.items()}
        return means, tracking.of_validation(plan, means, watch) if watch else {}
