"""The checkpoint format of QwenLM/ParScale, in and out.

Reading order: `layout.py` (its names and shapes), `importer.py` and `exporter.py` (the two ways),
`qwen2.py` (its config.json), `checkpoint.py` and `tensors.py` (its files).
"""

from .adapted import export_adapted
from .exporter import export_checkpoint
from .importer import import_checkpoint
from .tensors import CheckpointError
