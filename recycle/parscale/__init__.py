"""The method: parallel streams over a frozen causal LM. Importing it registers ParScale with PEFT.

It needs torch, transformers, peft, safetensors and huggingface_hub only.
"""

from .cache import CacheError, shrink_cache
from .config import ParScaleConfig
from .initialise import UnsupportedModelError, start_from_text, start_token_ids
from .model import ParScaleModel
from .register import register

__all__ = [
    "CacheError",
    "ParScaleConfig",
    "ParScaleModel",
    "UnsupportedModelError",
    "shrink_cache",
    "start_from_text",
    "start_token_ids",
]

register()
