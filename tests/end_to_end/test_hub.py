"""A bare model and a data set from the Hub, through the real command against a local stand-in."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from recycle import results
from tests.hub import Hub, hub_environment
from tests.runs import ROOT, STEP_TOKENS, assert_refused, recycle, texts

SMALL = (
    "data.source=hub",
    "data.path=tiny/data",
    "data.text_field=text",
    "data.group_field=null",
    "data.block_size=32",
    "data.validation_documents=3",
    "data.test_documents=6",
    f"training.tokens={4 * STEP_TOKENS}",
    "training.batch_size=4",
    "method.num_virtual_tokens=4",
    "backbone.dtype=float32",
    "evaluation.speed=false",
    "streams=2,4",
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_folder, root / "models" / "tiny" / "model")
    data = root / "datasets" / "tiny" / "data"
    data.mkdir(parents=True)
    (data / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    rows = [json.dumps({"text": text}) + "\n" for text in texts(48)]
    (data / "train.jsonl").write_text("".join(rows))
    with Hub(root) as server:
        yield server


def settings(url: str, home: Path) -> dict[str, str]:
    return hub_environment(url, home) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_model_and_a_data_set(hub: Hub, tmp_path: Path) -> None:
    env = settings(hub.url, tmp_path / "home")
    done = recycle("run", "tiny/model", *SMALL, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "Recipe: default recipe for the Hub model tiny/model" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    record = results.read(folder / "results.json")
    names = [model.name for model in record.models]
    assert names == ["backbone", "P = 1", "control", "P = 2", "P = 4"]
    commits = {
        kind: hub.repository(kind, name).commit
        for kind, name in (("models", "tiny/model"), ("datasets", "tiny/data"))
    }
    assert (record.backbone.source, record.backbone.id) == ("hub", "tiny/model")
    assert record.backbone.revision == commits["models"]
    assert record.data.facts["revision"] == commits["datasets"]
    assert "base_model: tiny/model" in (folder / "README.md").read_text()
    adapter = json.loads((folder / "control" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "tiny/model"
    assert adapter["revision"] == commits["models"]

    saved = (folder / "recipe.yaml").read_text()
    assert all(f"revision: {commit}" in saved for commit in commits.values())

    # What was downloaded is enough to use the run, with no Hub at all.
    offline = env | {"HF_HUB_OFFLINE": "1"}
    spoken = recycle(
        "generate",
        folder,
        "--prompt",
        "merge left",
        "--max-new-tokens",
        4,
        cwd=tmp_path,
        env=offline,
    )
    assert spoken.returncode == 0, spoken.stderr
    assert spoken.stdout.startswith("merge left")


@pytest.mark.slow
def test_the_hub_has_moved_on(tmp_path: Path, tiny_folder: Path) -> None:
    """The same command, and eval, go on with what the run has read."""
    root = tmp_path / "hub"
    shutil.copytree(tiny_folder, root / "models" / "tiny" / "model")
    data = root / "datasets" / "tiny" / "data" / "train.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(48)))
    with Hub(root) as server:
        env = settings(server.url, tmp_path / "home")
        done = recycle("run", "tiny/model", *SMALL, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        commit = server.repository("datasets", "tiny/data").commit
    (folder,) = (tmp_path / "runs").iterdir()
    first = results.read(folder / "results.json")
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60, seed=1)))
    with Hub(root) as server:
        env = settings(server.url, tmp_path / "home")
        assert server.repository("datasets", "tiny/data").commit != commit
        again = recycle("run", "tiny/model", *SMALL, cwd=tmp_path, env=env)
        assert "is finished" in again.stdout, again.stderr
        gone = recycle("run", folder / "recipe.yaml", "output.dir=new", cwd=tmp_path, env=env)
        assert_refused(gone, f"revision {commit}")  # the stand-in keeps one commit
    assert first.recipe["data"]["revision"] == commit
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_what_the_hub_lacks(hub: Hub, tmp_path: Path) -> None:
    env = settings(hub.url, tmp_path / "home")
    model = recycle("run", "tiny/unknown", *SMALL, cwd=tmp_path, env=env)
    assert_refused(model, "tiny/unknown", "the Hub has no model")
    other = [setting.replace("tiny/data", "tiny/nothing") for setting in SMALL]
    data = recycle("run", "tiny/model", *other, cwd=tmp_path, env=env)
    assert_refused(data, "data.path=tiny/nothing")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = settings(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path / "other")
        alone = recycle("run", "tiny/model", *SMALL, cwd=tmp_path, env=dead)
    assert_refused(alone, "cannot reach the Hub")
    assert not (tmp_path / "runs").exists()
