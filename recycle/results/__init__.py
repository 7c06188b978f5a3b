"""The record of a run: `results.json`, one schema from which every table, plot and card is made.

Needs pydantic and nothing heavier, so results can be read anywhere. Reading order: `schema.py` (the
record), made of `comparison.py` (losses and their differences), `tasks.py`, `estimates.py` and
`machine.py`; `effort.py` (what a row cost to train); `file.py` (on disk); `table.py` and
`task_table.py` (the tables).
"""

from .comparison import (
    ADAPTED,
    BACKBONE,
    CONTROL,
    LORA,
    WEIGHTS,
    Difference,
    Measurement,
    ModelResult,
    ScoredDocument,
    Speed,
    StreamUse,
    compare,
    paired_difference,
    token_mean,
)
from .effort import rows_of_training, with_training
from .estimates import Estimate, Estimates
from .file import ResultsError, read, write
from .machine import Hardware, hardware, packages
from .schema import (
    BackboneRecord,
    CurvePoint,
    DataRecord,
    FirstMeasurement,
    LossPoint,
    MemoryGib,
    Results,
    TrainingRecord,
    WallSeconds,
    precision,
)
from .table import (
    format_difference,
    precisions,
    rich_first_table,
    rich_table,
    shared_training,
    tabulate,
    tabulate_again,
)
from .task_table import perplexity, rich_tasks
from .tasks import Sample, TaskResult
