"""What cannot be done with streams, and what to do instead."""

from recycle.errors import RecycleError


class ParScaleError(RecycleError):
    """Streams do not run this way, or not with these settings."""


class UnsupportedModelError(ParScaleError):
    """The model has no attention that these prefixes, or this start of them, could enter."""


class CacheError(ParScaleError):
    """A key-value cache was filled by other streams than those in use, or cannot be changed so."""
