"""What a training step reads off the device: each time the host waits for a GPU."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recycle.recipe import resolve
from recycle.train.trainer import StreamTrainer
from tests.runs import write_recipe
from tests.test_train import Workshop


class Reads(TorchDispatchMode):
    """Counts what needs a value: `item`, `int`, `float`, `bool`."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_waits_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the begin of one step and that of the next."""
    found: list[tuple[int, int]] = []
    reads, lists = Reads(), [0]
    tolist, begin = Tensor.tolist, StreamTrainer.on_step_begin

    def counted(tensor: Tensor) -> Any:
        lists[0] += tensor.is_floating_point()  # the sampler's are whole numbers
        return tolist(tensor)

    def noted(trainer: StreamTrainer, *args: Any, **kwargs: Any) -> None:
        found.append((lists[0], reads.count))
        begin(trainer, *args, **kwargs)

    changes = {
        "training.tokens": 768,
        "training.checkpoint_steps": 99,
        "training.validation_steps": 99,
        "stages.streams.control": False,
    }
    workshop = Workshop(resolve(str(write_recipe(tmp_path, tiny_folder, **changes))).recipe)
    plan = workshop.plans(tmp_path)[-1]
    workshop.add(plan)
    monkeypatch.setattr(Tensor, "tolist", counted)
    monkeypatch.setattr(StreamTrainer, "on_step_begin", noted)
    with reads:
        workshop.train(plan)
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(found)]
    assert len(steps) == plan.steps - 1 > 0
    assert {each for each, _ in steps} == {1}  # the losses and the gradients' norm
    assert {each for _, each in steps} == {0}
