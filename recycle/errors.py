"""The one kind of error that the `recycle` command shows as a message and not as a traceback."""


class RecycleError(ValueError):
    """Something that its user can put right; the message says what is wrong and what to do.

    Every room has subclasses of its own. Anything else that is raised is a bug.
    """
