"""recycle: turn the language model you already have into a stronger one.

The public API, loaded on first use so that importing `recycle` loads no torch: `load`, `set_p`,
`use_p`, `get_p`, `available_p`; in mid-generation `change_p` and `shrink_cache`; for several
families on one backbone `add_family`, `remove_family`, `families`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .family.adapters import load
    from .family.addition import add_family, remove_family
    from .family.change import change_p
    from .family.switch import available_p, families, get_p, set_p, use_p
    from .parscale import shrink_cache

__all__ = [
    "__version__",
    "add_family",
    "available_p",
    "change_p",
    "families",
    "get_p",
    "load",
    "remove_family",
    "set_p",
    "shrink_cache",
    "use_p",
]
__version__ = "0.1.0"
_ELSEWHERE = {
    "change_p": "recycle.family.change",
    "load": "recycle.family.adapters",
    "shrink_cache": "recycle.parscale",
    **dict.fromkeys(("add_family", "remove_family"), "recycle.family.addition"),
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "recycle.family.switch")), name)
    raise AttributeError(f"module 'recycle' has no attribute {name!r}")
