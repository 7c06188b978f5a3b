"""Several P on one backbone: on disk, loaded, switched.

Reading order: `record.py` (what a family's folder says of itself), `folder.py` (how it is read and
written), `adapters.py` (on a backbone in memory), `switch.py` (which P is in use).

The names below are loaded on first use, so that `record.py` can be had without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .record import CONTROL, NESTED, Family, FamilyError

if TYPE_CHECKING:
    from recycle.parscale import shrink_cache

    from .adapters import (
        adapter_state,
        attach,
        check_backbone,
        find_backbone,
        load,
        member_state,
        save_family,
    )
    from .folder import find_folder, read_members
    from .switch import available_p, get_p, set_p, use_p

_ROOMS = {
    "recycle.parscale": ("shrink_cache",),
    "recycle.family.adapters": (
        *("adapter_state", "attach", "check_backbone", "find_backbone", "load", "member_state"),
        "save_family",
    ),
    "recycle.family.folder": ("find_folder", "read_members"),
    "recycle.family.switch": ("available_p", "get_p", "set_p", "use_p"),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(room), name)
    raise AttributeError(f"module 'recycle.family' has no attribute {name!r}")
