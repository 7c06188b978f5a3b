"""What would do where there is too little data."""

from collections.abc import Callable, Iterator, Sequence

from recycle.recipe import Data

from .text import DataError
from .training import StageData

FEW_BLOCKS = 64  # which an optimiser step may well want more than
SMALL = 2000  # documents; of so few it is tried out which settings would do


class Shortage(DataError):
    """A source holds too little for what was asked of it.

    Args:
        data: The section that is read.
        missing: "test", "validation", "tokens", "starts" or a part of a mix -> what, in words.
        blocks: Training rows that are there, of all stages that learn from it.
        documents: That were read.
        besides: What was left out, in words.
    """

    def __init__(
        self, data: Data, missing: dict[str, str], blocks: int, documents: int, besides: str
    ) -> None:
        super().__init__(f"There is too little data{besides}: {'; '.join(missing.values())}.")
        self.data = data
        self.missing = missing.keys() & {"test", "validation", "tokens", "starts"}
        self.blocks = blocks
        self.documents = documents


def advice(
    split: Callable[[Sequence[StageData]], object],
    stages: Sequence[StageData],
    shortage: Shortage,
) -> str:
    """Settings under which the source is enough; of a small one, found by trying them."""
    if shortage.missing == {"starts"}:
        return "Set method.init=random or a smaller method.num_virtual_tokens, or give more data."
    data = shortage.data
    give = "make more data.conversations" if data.source == "tasks" else "give more data"
    on_hub = "hub" in {data.source, *(part.source for part in data.mix.values())}
    small = not on_hub and shortage.documents <= SMALL
    found: Shortage | None = shortage
    for settings in ({}, *(_smaller(data) if small else ())):
        asked = [stage.smaller(settings) if stage.data == data else stage for stage in stages]
        concerned = [new for new, old in zip(asked, stages, strict=True) if old.data == data]
        size = concerned[0].data.block_size
        if settings:
            found = _tried(split, asked, concerned[0].data, shortage)
        changed = [f"data.{name}={value}" for name, value in settings.items()]
        more = ""
        if found is not None:
            if found.missing != {"tokens"} or found.blocks < len(concerned):
                continue
            if len(concerned) == 1:
                changed.append(f"training.tokens={found.blocks * size}")
            else:
                changed.append(f"training on {found.blocks * size} tokens in all stages together")
            few = found.blocks < FEW_BLOCKS
            more = f" (and training.batch_size at most {found.blocks})" if few else ""
        return f"This would do: {' '.join(changed)}{more}. Or {give}."
    return f"Smaller settings would not do either: {give}." if small else f"{give.capitalize()}."


def _tried(
    split: Callable[[Sequence[StageData]], object],
    asked: Sequence[StageData],
    data: Data,
    shortage: Shortage,
) -> Shortage | None:
    """What is still missing."""
    try:
        split(asked)
    except Shortage as still:
        return still if still.data == data else None  # another section's is told on its own
    except DataError:  # blocks are so small that nothing is left of any conversation
        return shortage
    return None


def _smaller(data: Data) -> Iterator[dict[str, int]]:
    """Ever smaller settings, as far as they differ from those of `data`."""
    for halvings in range(4):
        wanted = max(data.test_documents, data.validation_documents)
        while wanted >= 2:
            settings = {
                "test_documents": min(data.test_documents, wanted),
                "validation_documents": min(data.validation_documents, max(wanted // 2, 2)),
                "block_size": max(data.block_size >> halvings, 2),
            }
            yield {name: n for name, n in settings.items() if n != getattr(data, name)}
            wanted = wanted * 3 // 4
