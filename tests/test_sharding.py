"""A backbone shared out among two processes computes and learns what a whole one does."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import multiprocessing

from recycle.recipe import resolve
from recycle.run.folder import RunError
from recycle.run.parallel import in_parallel
from recycle.run.plan import plan_on
from tests import sharded
from tests.runs import write_recipe

TOLERANCE = 1e-5  # float32: sums in another order


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, see `tests/sharded.py`."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(sharded.main, (str(folder), port), nprocs=2)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", sharded.BACKBONES)
def test_each_process_holds_half_of_every_layer(found, kind):
    for one in found:
        assert one[kind]["sharded"] == [False, True]
        assert one[kind]["cut"] >= 18
        assert one[kind]["held"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", sharded.BACKBONES)
def test_what_is_put_on_it_is_whole_and_in_float32(found, kind):
    for one in found:
        assert one[kind]["streams"] == ["Parameter torch.float32"]
        assert one[kind]["starts"] < TOLERANCE


@pytest.mark.parametrize("kind", sharded.BACKBONES)
def test_it_computes_what_a_whole_one_does(found, kind):
    for one in found:
        assert all(apart < TOLERANCE for apart in one[kind]["logits"].values())
        assert one[kind]["replies"]


@pytest.mark.parametrize("kind", sharded.BACKBONES)
def test_gradients_are_those_of_the_whole_batch(found, kind):
    """Of streams, also with gradient checkpointing, and of a LoRA."""
    for one in found:
        assert max(one[kind]["gradients"]) < TOLERANCE
        assert one[kind]["in groups"] < TOLERANCE
        assert one[kind]["lora"] < TOLERANCE


@pytest.mark.parametrize("kind", sharded.BACKBONES)
def test_streams_learn_as_in_one_process(found, kind):
    for one in found:
        assert one[kind]["learning"]["loss"] < TOLERANCE
        assert one[kind]["learning"]["learned"] > 0.01
        assert one[kind]["learning"]["equal"]


def test_layers_of_several_dtypes(found):
    assert found[0]["mixed"]["logits"] == found[1]["mixed"]["logits"] == 0


def test_gradients_that_some_processes_lack(found):
    for one in found:
        assert one["unused"]["gradients"] == [[3.0, 3.0], [1.0, 1.0], None]


def test_what_is_not_cut_up_is_refused(found):
    whole = "Let every process hold the whole backbone: set launch.parallel=ddp."
    assert found[0]["quantised"]["refused"] == (
        f"The weights of a quantised backbone are not cut up. {whole}"
    )
    assert found[0]["shared"]["refused"] == f"Layers of ZambaForCausalLM share weights. {whole}"


@pytest.fixture
def parts(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., bool]:
    """Whether each process gets a part of the backbone, on GPUs of so many KiB."""

    def sharded(device: str = "cuda", kib: int = 2**20, processes: int = 2, **changes: Any) -> bool:
        gpu = SimpleNamespace(total_memory=kib * 1024)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
        recipe = resolve(str(write_recipe(tmp_path, tiny_folder, **changes))).recipe
        plan = plan_on(recipe, tmp_path / "run", device)
        return in_parallel(plan, processes).sharded

    return sharded


def test_a_backbone_is_cut_up_where_a_gpu_has_no_room_for_it(parts):
    assert not parts()
    assert parts(kib=512)
    assert not parts(kib=512, **{"launch.parallel": "ddp"})
    assert not parts(kib=512, **{"backbone.quantization": "nf4"})
    assert not parts(kib=512, **{"stages.adapt.train": "full"})
    assert not parts("cpu")
    assert parts("cpu", **{"launch.parallel": "fsdp"})


def test_alone_a_process_holds_all_of_it(parts):
    assert not parts(kib=512, processes=1, **{"launch.parallel": "fsdp"})


def test_quantised_weights_are_not_cut_up(parts):
    with pytest.raises(RunError, match=r"in nf4 are not cut up\. Set launch\.parallel=ddp"):
        parts(**{"launch.parallel": "fsdp", "backbone.quantization": "nf4"})


def test_weights_that_learn_are_not_cut_up(parts):
    with pytest.raises(RunError, match="fsdp shares out weights that are frozen"):
        parts(**{"launch.parallel": "fsdp", "stages.adapt.train": "full"})
