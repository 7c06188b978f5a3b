"""recycle: turn the language model you already have into a stronger one.

The public API, loaded on first use so that importing `recycle` loads no torch: `load`, `set_p`,
`use_p`, `get_p`, `available_p`, `shrink_cache`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .family.adapters import load
    from .family.switch import available_p, get_p, set_p, use_p
    from .parscale import shrink_cache

__all__ = ["__version__", "available_p", "get_p", "load", "set_p", "shrink_cache", "use_p"]
__version__ = "0.1.0"
_ELSEWHERE = {"load": "recycle.family.adapters", "shrink_cache": "recycle.parscale"}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "recycle.family.switch")), name)
    raise AttributeError(f"module 'recycle' has no attribute {name!r}")
