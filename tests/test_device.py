"""The device that a run takes, and what it computes in there. No GPU is needed."""

import pytest
import torch

from recycle.cost.passes import peak_memory
from recycle.evaluate.speed import _clock
from recycle.recipe import Backbone, Launch
from recycle.run.folder import RunError
from recycle.run.machine import describe, device_of, with_dtype


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of Apple's, as far as torch tells of one."""
    monkeypatch.setattr("torch.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 12 * 2**30)
    monkeypatch.setattr("torch.mps.driver_allocated_memory", lambda: 123)
    monkeypatch.setattr("torch.backends.mps.get_name", lambda: "Apple M9")
    monkeypatch.setattr("torch.backends.mps.is_macos_or_newer", lambda major, minor: major <= 14)


@pytest.mark.parametrize(
    ("asked", "cuda", "mps", "taken"),
    [
        ("auto", True, True, "cuda"),
        ("auto", False, True, "mps"),
        ("auto", False, False, "cpu"),
        ("mps", True, True, "mps"),
        ("cpu", True, True, "cpu"),
    ],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(
    monkeypatch: pytest.MonkeyPatch, asked: str, cuda: bool, mps: bool, taken: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.cuda.device_count", lambda: int(cuda))
    monkeypatch.setattr("torch.mps.is_available", lambda: mps)
    monkeypatch.setattr("torch.mps.device_count", lambda: int(mps))
    assert device_of(Launch.model_validate({"device": asked})) == taken


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.mps.is_available", lambda: False)
    with pytest.raises(RunError, match=f"launch.device={device}, .* no {device.upper()} device"):
        device_of(Launch.model_validate({"device": device}))


def test_each_process_takes_a_gpu_of_its_own(apple: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("torch.mps.device_count", lambda: 1)
    with pytest.raises(RunError, match=r"2 processes on this machine, and torch sees 1 GPUs"):
        device_of(Launch(device="mps"))
    assert device_of(Launch(device="cpu")) == "cpu"


def test_what_apples_gpu_computes_in_and_is_called(apple: None) -> None:
    assert with_dtype(Backbone(id="org/model"), "mps").dtype == "bfloat16"
    described = describe("mps")
    assert (described.gpu, described.gpu_memory_gib) == ("Apple M9", 12)


def test_its_memory_and_its_clock(apple: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_memory(torch.device("mps")) == 123
    waited: list[torch.device] = []
    monkeypatch.setattr("torch.accelerator.synchronize", waited.append)
    assert _clock(torch.device("mps")) > 0
    assert _clock(torch.device("cpu")) > 0
    assert waited == [torch.device("mps")]
