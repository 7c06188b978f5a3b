"""The record of a run: `results.json`, one schema from which every table, plot and card is made.

Imports pydantic and the standard library only, so that results can be read anywhere. Reading order:
`schema.py` (the record) on `comparison.py` (measurements and what follows) and `machine.py`,
`file.py` (on disk), `table.py` (to be read).
"""

from .comparison import (
    BACKBONE,
    CONTROL,
    Difference,
    Measurement,
    ModelResult,
    ScoredDocument,
    Speed,
    compare,
    paired_difference,
)
from .file import ResultsError, read, write
from .machine import Hardware, hardware, packages
from .schema import (
    BackboneRecord,
    CurvePoint,
    DataRecord,
    FirstMeasurement,
    LossPoint,
    Results,
    TrainingRecord,
    WallSeconds,
    precision,
)
from .table import (
    COLUMNS,
    FIRST_COLUMNS,
    first_table,
    format_difference,
    precisions,
    rich_first_table,
    rich_table,
    shared_training,
    table,
)

__all__ = [
    "BACKBONE",
    "COLUMNS",
    "CONTROL",
    "FIRST_COLUMNS",
    "BackboneRecord",
    "CurvePoint",
    "DataRecord",
    "Difference",
    "FirstMeasurement",
    "Hardware",
    "LossPoint",
    "Measurement",
    "ModelResult",
    "Results",
    "ResultsError",
    "ScoredDocument",
    "Speed",
    "TrainingRecord",
    "WallSeconds",
    "compare",
    "first_table",
    "format_difference",
    "hardware",
    "packages",
    "paired_difference",
    "precision",
    "precisions",
    "read",
    "rich_first_table",
    "rich_table",
    "shared_training",
    "table",
    "write",
]
