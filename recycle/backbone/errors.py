"""What goes wrong with a backbone, told in one message."""

from recycle.errors import RecycleError


class BackboneError(RecycleError):
    """A backbone cannot be had; the message says why and what to do."""


def first_line(error: Exception) -> str:
    """The first line of another library's message, or the error's type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
