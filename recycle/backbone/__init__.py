"""Hub id, folder or `package://PACKAGE/FILE.gguf` -> frozen model, tokenizer and their source."""

from .errors import BackboneError
from .load import BackboneConfig, Source, keep_gradients_on_cpu, load, resolve_source

__all__ = [
    "BackboneConfig",
    "BackboneError",
    "Source",
    "keep_gradients_on_cpu",
    "load",
    "resolve_source",
]
