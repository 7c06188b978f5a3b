"""How many processes a run has, and starting them by torchrun's own launcher."""

import ctypes
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from recycle.recipe import Recipe, stages

from .folder import RunError, kept

AGAIN = os.EX_TEMPFAIL  # the exit status that asks a scheduler for another try
RUN_ID = "recycle"  # by which our own launcher is known
PR_SET_PDEATHSIG = 1  # of Linux's prctl
GRACE = 300  # seconds that a process has for its last step and checkpoint


def processes_to_start(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> int:
    """How many processes are to be started for a run; 0 where this one carries it out.

    Raises:
        RunError: The processes that a launcher started are not those that were asked for, or the
            batch cannot be shared out among them.
    """
    asked = recipe.launch.processes
    if "RANK" in environment:
        world = int(environment["WORLD_SIZE"])
        if asked not in (None, world):
            raise RunError(
                f"launch.processes={asked}, and the launcher started {world}. Leave "
                "launch.processes out under torchrun."
            )
        check_shares(recipe, world)
        return 0
    if "MASTER_ADDR" in environment or environment.get("WORLD_SIZE", "1") != "1":
        raise RunError(
            "A launcher asked for several processes (it set MASTER_ADDR or WORLD_SIZE) and started "
            "this one alone, as `accelerate launch --cpu` does. Use torchrun, or `recycle run` "
            "with launch.processes=N; for a run of one process, `unset MASTER_ADDR WORLD_SIZE`."
        )
    if asked is None:
        asked = _for_each_gpu(recipe)
    check_shares(recipe, asked)
    return asked if asked > 1 else 0


def check_shares(recipe: Recipe, processes: int) -> None:
    """Refuse a number of processes that does not divide the batches: each takes as many blocks."""
    for stage in stages(recipe):
        batch = stage.training.batch_size
        if batch % processes:
            fitting = [n for n in range(1, batch + 1) if batch % n == 0]
            raise RunError(
                f"{processes} processes share out the blocks of a step, and batch_size={batch} of "
                f"the stage {stage.name} is no multiple of {processes}. Take "
                f"launch.processes={' or '.join(map(str, fitting))}, or another batch_size."
            )


def _for_each_gpu(recipe: Recipe) -> int:
    """One process for each GPU, as far as the batches can be shared out."""
    if recipe.launch.device not in ("auto", "cuda"):
        return 1
    import torch

    batch = math.gcd(*(stage.training.batch_size for stage in stages(recipe)))
    most = max(torch.cuda.device_count(), 1)
    return max(n for n in range(1, most + 1) if batch % n == 0)


def launch(processes: int, arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """Carry out a `recycle` command in several processes on this machine.

    Args:
        processes: How many.
        arguments: Of the command.
        folder: The run's.

    Returns:
        The exit status, and what there is to say that no process says itself.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # of torchrun: what there is to say comes at the end
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max((cores or 1) // processes, 1)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=RUN_ID,
        max_restarts=0,
        shutdown_timeout=GRACE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "recycle", *arguments)
    except SignalException as stopped:
        return (130 if stopped.sigval == signal.SIGINT else AGAIN), kept(folder)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            by_signal = failure.exitcode in (AGAIN, 130)  # to the processes alone
            return failure.exitcode, kept(folder) if by_signal else ""  # else it has said why
        name = signal.Signals(-failure.exitcode).name
        return 1, f"Process {rank} of {processes} was ended by {name}. {kept(folder)}"
    return 0, ""


def end_with_launcher() -> None:
    """Let SIGTERM come where our own launcher is killed, on Linux; elsewhere a process goes on."""
    if is_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def is_launched() -> bool:
    """Whether our own launcher started this process."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID


def told_of_loss() -> bool:
    """Whether this process is to say that another one has ended.

    Our own launcher says it itself; and one that ended with an error has said why meanwhile.
    """
    time.sleep(2)  # the other one ends first, with its message and status
    return not is_launched()
