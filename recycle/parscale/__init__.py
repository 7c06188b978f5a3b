"""The method: parallel streams over a frozen causal LM. Importing it registers ParScale with PEFT.

It needs torch, transformers, peft, safetensors and huggingface_hub only.
"""

from .cache import CacheError, shrink_cache
from .config import ParScaleConfig
from .family import FamilyError, load
from .initialise import UnsupportedModelError, start_from_text, start_token_ids
from .model import ParScaleModel
from .register import register
from .switch import available_p, get_p, set_p, use_p

__all__ = [
    "CacheError",
    "FamilyError",
    "ParScaleConfig",
    "ParScaleModel",
    "UnsupportedModelError",
    "available_p",
    "get_p",
    "load",
    "set_p",
    "shrink_cache",
    "start_from_text",
    "start_token_ids",
    "use_p",
]

register()
