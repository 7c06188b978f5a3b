"""Models and data sets over the Hub's HTTP interface, against the local stand-in of tests/hub.py.

Each part runs in a subprocess: huggingface_hub reads HF_ENDPOINT when it is imported.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recycle.backbone.fingerprint import fingerprint_model
from recycle.family.adapters import save_family
from tests.adapters import stream_model
from tests.hub import TOKEN, Hub, hub_environment
from tests.tiny import save_tiny, tiny_model

PROLOGUE = """
import json
from types import SimpleNamespace
from recycle import backbone as backbones

def load(id, revision=None):
    config = SimpleNamespace(id=id, revision=revision, dtype="float32",
                             attn_implementation="sdpa", quantization=None)
    return backbones.load_backbone(config)

def outcome(id, revision=None):
    try:
        model, tokenizer, source = load(id, revision)
    except backbones.BackboneError as error:
        assert error.__suppress_context__ or error.__context__ is None
        return str(error)
    return {"fingerprint": source.fingerprint.to_dict(), "tokens": len(tokenizer),
            "id": source.id, "revision": source.revision, "name": model.name_or_path}
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    for name in ("model", "gated"):
        shutil.copytree(tiny_folder, root / "models" / "tiny" / name)
    (save_tiny(root / "models" / "tiny" / "pickled") / "model.safetensors").rename(
        root / "models" / "tiny" / "pickled" / "pytorch_model.bin"
    )
    sharded = root / "models" / "tiny" / "sharded"
    save_tiny(sharded)
    (sharded / "model.safetensors").unlink()
    tiny_model().save_pretrained(sharded, max_shard_size="200KB")
    data = root / "datasets" / "tiny" / "data"
    data.mkdir(parents=True)
    rows = [{"text": f"def f{number}(): return {number}"} for number in range(30)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Hub(root, gated=("tiny/gated",)) as server:
        yield server


def run(url: str, home: Path, script: str, **environment: str) -> Any:
    """Run the script after the prologue; return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + script],
        env=hub_environment(url, home) | {"PYTHONPATH": os.getcwd()} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_and_a_data_set(hub: Hub, tmp_path: Path) -> None:
    script = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from datasets import load_dataset
model = AutoModelForCausalLM.from_pretrained("tiny/model")
tokenizer = AutoTokenizer.from_pretrained("tiny/model")
rows = load_dataset("tiny/data", split="train", streaming=True)
print(json.dumps({"parameters": model.num_parameters(), "tokens": len(tokenizer),
                  "texts": [row["text"] for row in rows]}))
"""
    found = run(hub.url, tmp_path, script)
    assert found["parameters"] == 123_456
    assert found["tokens"] == 384
    assert found["texts"] == [f"def f{number}(): return {number}" for number in range(30)]


def test_backbones(hub: Hub, tmp_path: Path, tiny_folder: Path) -> None:
    script = """
print(json.dumps({name: outcome(*name.split("@")) for name in (
    "tiny/model", "tiny/model@main", "tiny/sharded", "tiny/model@v9",
    "tiny/unknown", "tiny/gated", "tiny/pickled")}))
"""
    found = run(hub.url, tmp_path, script)
    commit = hub.repository("models", "tiny/model").commit
    local = fingerprint_model(tiny_folder)
    expected = local.to_dict() | {"id": "tiny/model", "revision": commit}
    assert found["tiny/model"] == {
        "fingerprint": expected,
        "tokens": 384,
        "id": "tiny/model",
        "revision": commit,
        "name": "tiny/model",
    }
    assert found["tiny/model@main"] == found["tiny/model"]
    assert found["tiny/sharded"]["fingerprint"]["samples"] == local.samples

    assert found["tiny/model@v9"] == (
        "model 'tiny/model' has no revision 'v9': take a branch, tag or commit"
    )
    assert "the Hub has no model 'tiny/unknown'" in found["tiny/unknown"]
    assert "access to model 'tiny/gated' is gated" in found["tiny/gated"]
    assert "hf auth login" in found["tiny/gated"]
    assert "weights must be safetensors" in found["tiny/pickled"]
    assert not any("pytorch_model.bin" in request for request in hub.requests)


def test_a_plan_fetches_the_config_alone(hub: Hub, tmp_path: Path) -> None:
    script = """
from recycle.cost.inference import Request
from recycle.recipe import resolve
from recycle.run.forecast import forecast
found = forecast(resolve("tiny/sharded").recipe, "h200", (1, 2), Request())
print(json.dumps({"parameters": found.parameters, "p": [x.p for x in found.estimates]}))
"""
    before = len(hub.requests)
    assert run(hub.url, tmp_path, script) == {"parameters": 123_456, "p": [1, 2]}
    asked = " ".join(hub.requests[before:])
    assert "config.json" in asked
    assert "safetensors" not in asked


def test_a_family_on_a_gated_backbone(hub: Hub, tmp_path: Path, tiny_folder: Path) -> None:
    backbone = replace(fingerprint_model(tiny_folder), id="tiny/gated")
    model = stream_model(tiny_model(), adapter_name="nested")
    (tmp_path / "run").mkdir()
    save_family(model, tmp_path / "run", backbone)
    options = {"token": TOKEN, "cache_dir": str(tmp_path / "here")}
    cached = options | {"local_files_only": True}

    def load(*attempts: dict[str, Any]) -> Any:
        script = f"""
import recycle
found = []
for options in {attempts}:
    try:
        found.append(recycle.available_p(recycle.load("{tmp_path}/run", **options)))
    except ValueError as error:
        found.append(str(error))
print(json.dumps(found))
"""
        return run(hub.url, tmp_path, script)

    refused, *loaded = load({}, options, cached)
    assert "'tiny/gated' is gated: accept its terms" in refused
    assert loaded == [[1, 2, 4], [1, 2, 4]]
    assert (tmp_path / "here" / "models--tiny--gated").is_dir()
    assert not list((tmp_path / "huggingface").rglob("model.safetensors"))
    count = len(hub.requests)
    assert load(cached, cached) == loaded
    assert hub.requests[count:] == []


def test_only_the_files_of_the_p_that_are_needed_are_fetched(
    tmp_path: Path, tiny_folder: Path
) -> None:
    root = tmp_path / "hub"
    shutil.copytree(tiny_folder, root / "models" / "tiny" / "model")
    folder = root / "models" / "tiny" / "family"
    folder.mkdir()
    model = stream_model(tiny_model(), adapter_name="nested")
    save_family(model, folder, replace(fingerprint_model(tiny_folder), id="tiny/model"))
    script = """
import recycle
model = recycle.load("tiny/family", only=[2])
found = [recycle.available_p(model)]
recycle.add_family(model, "tiny/family", "more"{})
print(json.dumps([*found, recycle.available_p(model, "more")]))
"""
    with Hub(root) as server:

        def fetched(home: str, more: str) -> tuple[Any, set[str]]:
            count = len(server.requests)
            found = run(server.url, tmp_path / home, script.format(more))
            paths = [x.partition("/tiny/family/resolve/")[2] for x in server.requests[count:]]
            names = {path.partition("/")[2] for path in paths}
            return found, {name for name in names if name.startswith("p")}

        of_two = {"p2/adapter_config.json", "p2/adapter_model.safetensors"}
        assert fetched("few", ", only=[2]") == ([[1, 2], [1, 2]], of_two)
        of_four = {name.replace("p2", "p4") for name in of_two}
        assert fetched("all", "") == ([[1, 2], [1, 2, 4]], of_two | of_four)


@pytest.mark.slow
def test_without_the_server(hub: Hub, tmp_path: Path) -> None:
    script = """
import time
started = time.monotonic()
outcomes = [outcome("tiny/model"), outcome("tiny/other")]
print(json.dumps([*outcomes, time.monotonic() - started]))
"""
    online, *_ = run(hub.url, tmp_path, script)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
        cached, missing, seconds = run(dead, tmp_path, script)
    assert cached == online  # once downloaded, no network is needed
    assert "cannot reach the Hub, and its cache does not hold the files of model" in missing
    assert "unset HF_HUB_OFFLINE" in missing
    assert seconds < 10  # measured: 0.4 s; a single file asked for with retries costs 23 s

    count = len(hub.requests)
    offline = run(hub.url, tmp_path, script, HF_HUB_OFFLINE="1")
    assert offline[:2] == [cached, missing]
    assert hub.requests[count:] == []
