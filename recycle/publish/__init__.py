"""A finished run on the Hub. Reading order: `contents.py` (what leaves), `hub.py` (how)."""

from .contents import PublicationError, contents
from .hub import push
