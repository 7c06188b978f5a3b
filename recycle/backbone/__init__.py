"""Hub id, folder or `package://PACKAGE/FILE.gguf` -> frozen model, tokenizer and their source."""

from .errors import BackboneError
from .load import BackboneConfig, Source, load, resolve_source

__all__ = [
    "BackboneConfig",
    "BackboneError",
    "Source",
    "load",
    "resolve_source",
]
