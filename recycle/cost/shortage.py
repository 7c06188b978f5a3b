"""Out of memory: which two fields of a recipe to change, and to what."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch

from recycle.errors import RecycleError
from recycle.recipe.consequences import FREE

Change = tuple[str, object, object]
"""A field, what to set it to, and what it is now."""
# In the words of torch's allocator for CPUs, of C++, and of CUDA's libraries.
WORDS = re.compile(r"not enough memory|can't allocate memory|bad_alloc|ALLOC_FAILED|out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no more memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(WORDS.search(str(error)))


@contextmanager
def enough_memory(
    kind: type[RecycleError], what: str, changes: Callable[[], Iterator[Change]]
) -> Iterator[None]:
    """Turn running out of memory into an error that says what to change.

    Args:
        kind: Of the error that is raised in its place.
        what: Was being done.
        changes: What would take less memory, the best first; the first two are told.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = re.sub(r"^\[enforce fail.*?\] err == 0\. ", "", str(error).strip())
        detail = (found or type(error).__name__).splitlines()[0][:200].rstrip(".")
        raise kind(f"Out of memory in {what}: {detail}. {advice(changes())}") from error


def advice(changes: Iterator[Change]) -> str:
    """The first two changes in words, and how to go on."""
    told = list(islice(changes, 2))
    if not told:
        return "Nothing of the recipe takes less: take a smaller model or more memory."
    fields = " and ".join(f"{field}={_text(new)} (now {_text(now)})" for field, new, now in told)
    goes_on = "Give the same command again with these: it goes on from what is kept."
    if not all(field in FREE or field.startswith("launch.") for field, _, _ in told):
        goes_on = "With these it is another recipe: start it with --new."
    return f"Set {fields}. {goes_on}"


def halved(size: int, of: int = 0) -> int:
    """The largest number up to half of a size, that divides `of` where this is given."""
    return next(x for x in range(size // 2, 0, -1) if of % x == 0)


def _text(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
