"""What processes tell each other, with two of them; and the splits that one reads for all."""

import os
import re
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from recycle import preemption, world
from recycle.data import Splits, keep
from recycle.data.evaluation import Document
from recycle.recipe import resolve
from recycle.run.folder import RunError
from recycle.run.launch import launch, processes_to_start
from tests.runs import write_recipe


def _found(rank: int, port: int, folder: str) -> None:
    """One of two processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ["MASTER_PORT"] = str(port)
    with world.joined("cpu"):
        assert world.gather(rank * 10) == [0, 10]
        done: list[int] = []
        assert world.once(lambda: done.append(rank) or rank + 5) == 5
        assert done == [0] * (rank == 0)
        assert world.share(range(5), lambda x: (x, rank)) == [(x, x % 2) for x in range(5)]
        assert world.add_up(torch.tensor([1.0, rank])).tolist() == [2, 1]
        with pytest.raises(ZeroDivisionError if rank == 0 else world.OtherProcessError):
            world.once(lambda: 1 // 0)
        assert sorted(world.gather(world.fails_first())) == [False, True]
        splits = keep(Path(folder), lambda: _splits(rank))
        assert splits.test[0].name == "read by 0"


def _splits(number: int) -> Splits:
    import datasets

    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    document = Document(f"read by {number}", "a", [1, 2], [1, 2], 4)
    return Splits((rows,), ([document],), [document], torch.tensor([[3, 4]]), ({"x": 1},))


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_found, (port, str(tmp_path / "data")), nprocs=2)


def test_splits_are_read_once(tmp_path: Path) -> None:
    first = keep(tmp_path / "data", lambda: _splits(0))
    again = keep(tmp_path / "data", lambda: pytest.fail("read again"))
    assert again.train[0].to_dict() == first.train[0].to_dict() == _splits(0).train[0].to_dict()
    assert (again.test, again.validation, again.facts) == (
        first.test,
        first.validation,
        ({"x": 1},),
    )
    assert again.starts.tolist() == [[3, 4]]
    (tmp_path / "data" / "splits.json").unlink()  # killed while it wrote
    assert keep(tmp_path / "data", lambda: _splits(1)).test[0].name == "read by 1"


@pytest.mark.parametrize(
    ("environment", "processes", "expected"),
    [
        ({}, None, 0),
        ({}, 1, 0),
        ({}, 2, 2),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, None, 0),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, 2, 0),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, 4, "launch.processes=4, and the "),
        ({"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "x"}, None, "no multiple of 3"),
        ({"MASTER_ADDR": "x"}, None, "started this one alone"),
        ({"WORLD_SIZE": "2"}, None, "started this one alone"),
    ],
)
def test_processes_to_start(
    environment: dict[str, str], processes: int | None, expected: int | str, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, tmp_path, **{"launch.processes": processes})
    recipe = resolve(str(path)).recipe
    if isinstance(expected, str):
        with pytest.raises(RunError, match=expected):
            processes_to_start(recipe, environment)
    else:
        assert processes_to_start(recipe, environment) == expected


def test_a_process_for_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    recipe = resolve(str(write_recipe(tmp_path, tmp_path, **{"launch.device": "auto"}))).recipe
    assert processes_to_start(recipe, {}) == 2  # of 4 blocks to a step


def _end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    pytest.fail("went on")


def _train(done: list[str]) -> None:
    with preemption.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        done += ["checkpoint"] * preemption.asked()
    pytest.fail("went on")


def test_sigterm_waits_for_the_end_of_a_training(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: setattr(preemption._State, "asked", False))
    request.addfinalizer(partial(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM)))
    done: list[str] = []
    with preemption.handled():
        with pytest.raises(preemption.Preempted):
            _end()
        with pytest.raises(preemption.Preempted):
            _train(done)
    assert done == ["checkpoint"]


def test_no_process_touches_the_gpu_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would set up every GPU that it sees, and some memory on each of them."""
    touched: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: touched.append(str(device)))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    for device in ("cpu", "cuda:1"):
        before = torch.get_rng_state()
        with world.own_random_state(torch.device(device)):
            torch.rand(1)
        assert torch.equal(torch.get_rng_state(), before)
    assert touched == ["cuda:1"]


@pytest.mark.parametrize(
    ("exitcode", "status", "told"),
    [
        (75, 75, "^Stopped"),
        (130, 130, "^Stopped"),
        (2, 2, "^$"),
        (-9, 1, "Process 1 of 2 .*SIGKILL"),
    ],
)
def test_what_our_launcher_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exitcode: int, status: int, told: str
) -> None:
    """Also where a signal reached the processes alone, which leave the word to it."""
    monkeypatch.setattr("logging.disable", lambda: None)
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=exitcode, error_file="none")

    def elastic_launch(config: Any, entry: str) -> Any:
        def run(*arguments: str) -> None:
            raise ChildFailedError("recycle", {1: failure})

        return run

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found, text = launch(2, ["run", "x.yaml"], tmp_path)
    assert found == status
    assert re.search(told, text)
