"""Several P on one backbone: on disk, loaded, switched.

Reading order: `record.py` (what a family's folder says of itself), `folder.py` (how it is read and
written), `adapters.py` (on a backbone in memory), `switch.py` (which P is in use). Only `record.py`
can be had without torch, so the others are imported by their own names.
"""

from .record import ADAPTED, CONTROL, NESTED, Family, FamilyError
