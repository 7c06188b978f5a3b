"""Several P on one backbone: on disk, loaded, switched.

Reading order: `folder.py` (how a family lies on disk), `adapters.py` (put on a backbone, and saved
again), `switch.py` (which P is in use).
"""

from recycle.parscale import shrink_cache

from .adapters import attach, load, member_state, save_family
from .folder import CONTROL, NESTED, Family, FamilyError, read_members
from .switch import available_p, get_p, set_p, use_p

__all__ = [
    "CONTROL",
    "NESTED",
    "Family",
    "FamilyError",
    "attach",
    "available_p",
    "get_p",
    "load",
    "member_state",
    "read_members",
    "save_family",
    "set_p",
    "shrink_cache",
    "use_p",
]
