"""Hub id, folder or `package://PACKAGE/FILE.gguf` -> frozen model, tokenizer and their source."""

from .errors import BackboneError
from .loading import (
    BackboneConfig,
    Source,
    load_backbone,
    load_model,
    load_tokenizer,
    resolve_source,
)
