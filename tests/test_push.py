"""A family goes to the Hub's stand-in by the command, and comes back with the same logits."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from rich.console import Console
from transformers import AutoTokenizer

from recycle import results
from recycle.backbone.fingerprint import fingerprint_model
from recycle.family.adapters import save_family
from recycle.publish import PublicationError, contents, push
from recycle.recipe import resolve
from recycle.results import TaskResult
from tests.adapters import stream_model
from tests.hub import TOKEN, hub_environment
from tests.hub_upload import READER, UploadHub
from tests.runs import ROOT, assert_refused, recycle, write_recipe
from tests.test_results import make_results
from tests.tiny import tiny_model, tiny_tokenizer

FILES = {
    *("README.md", "report.md", "report.html", "loss_vs_streams.png", "loss_vs_tokens.png"),
    *("loss_vs_latency.png", "loss_vs_memory.png", "paper_law.png"),
    *("results.json", "family.json", "tokenizer.json", "tokenizer_config.json"),
    *(f"p{p}/adapter_{x}" for p in (2, 4) for x in ("config.json", "model.safetensors")),
}


@pytest.fixture
def hub(tmp_path: Path, tiny_folder: Path) -> Iterator[UploadHub]:
    shutil.copytree(tiny_folder, tmp_path / "hub" / "models" / "tiny" / "model")
    with UploadHub(tmp_path / "hub") as server:
        yield server


def finished_run(folder: Path, backbone: str = "tiny/model", at: Path | None = None) -> Path:
    """A run folder as `recycle run` leaves it, of adapters that were never trained."""
    recipe = resolve(str(write_recipe(folder, at or Path(backbone)))).recipe
    run = folder / "runs" / "tiny"
    run.mkdir(parents=True)
    fingerprint = replace(fingerprint_model(at or folder / "hub/models/tiny/model"), id=backbone)
    save_family(stream_model(tiny_model(), adapter_name="nested"), run, fingerprint)
    tiny_tokenizer().save_pretrained(run)
    source = "folder" if at else "hub"
    record = make_results()
    task = TaskResult(
        name="arithmetic",
        metric="exact_match",
        higher_is_better=True,
        settings={"path": str(folder / "sums.jsonl")},
        date=datetime(2026, 1, 2, tzinfo=UTC),
        command=f"recycle eval {run} --task {folder}/sums.jsonl",
        scores={"P = 4": (1.0, 0.0, 1.0, 1.0)},
    )
    record = make_results(
        recipe=recipe.model_dump(mode="json"),
        command=f"recycle run {folder}/tiny.yaml",
        backbone=record.backbone.model_copy(update={"id": backbone, "source": source}),
        data=results.DataRecord(source="files", path=str(folder / "texts"), facts={}),
        hardware=record.hardware.model_copy(update={"platform": "Linux-6.1-acme-x86_64"}),
        tasks=(task,),
    )
    results.write(record, run / "results.json")
    (run / "recipe.yaml").write_text(f"output:\n  dir: {folder}\n")
    for left in ("optimizer.pt", "checkpoints/step-2/scheduler.json", "lora/adapter_config.json"):
        (run / left).parent.mkdir(parents=True, exist_ok=True)
        (run / left).write_text("stays here")
    return run


def environment(hub_url: str, home: Path, **changes: str) -> dict[str, str]:
    return hub_environment(hub_url, home) | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_TOKEN": TOKEN,
        **changes,
    }


def test_a_family_goes_and_comes_back(hub: UploadHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    env = environment(hub.url, tmp_path / "home")
    done = recycle("push", run, "tiny/family", "--private", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "tiny/family is new: 16 files" in done.stdout
    assert f"Published: {hub.url}/tiny/family/commit/" in done.stdout
    assert hub.visibility == {"tiny/family": "private"}
    (commit,) = hub.commits
    assert set(commit["added"]) == FILES

    there = hub.root / "models" / "tiny" / "family"
    for file in FILES - {x for x in FILES if x.endswith(".png")}:
        content = (there / file).read_bytes()
        assert str(tmp_path).encode() not in content, file
        assert b"acme" not in content, file
    weights = "p4/adapter_model.safetensors"
    assert (there / weights).read_bytes() == (run / weights).read_bytes()
    read = results.read(there / "results.json")
    assert (read.data.path, read.tasks[0].settings) == ("texts", {"path": "sums.jsonl"})
    assert read.models == results.read(run / "results.json").models
    template = AutoTokenizer.from_pretrained(there).chat_template
    assert template == tiny_tokenizer().chat_template is not None

    card = ModelCard((there / "README.md").read_text(), ignore_metadata_errors=False)
    shown = card.data.to_dict()
    assert (shown["base_model"], shown["base_model_relation"]) == ("tiny/model", "adapter")
    losses, sums = shown["model-index"][0]["results"]
    names = [x["name"].partition(":")[0] for x in losses["metrics"]]
    assert names == ["backbone", "control", "P = 2", "P = 4"]
    assert losses["metrics"][3]["value"] == 2.4333
    assert sums["dataset"] == {"name": "arithmetic", "type": "arithmetic"}
    assert (sums["metrics"][0]["type"], sums["metrics"][0]["value"]) == ("exact_match", 0.75)
    assert 'recycle.load("tiny/family", p=4)' in card.text
    assert "- `p4/`: P = 4, 1,234,567 parameters" in card.text

    script = """
import recycle, sys, torch
ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
for source in sys.argv[1:]:
    print(recycle.load(source, p=4)(input_ids=ids).logits[0].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(run), "tiny/family"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    ours, theirs = done.stdout.splitlines()
    assert ours == theirs
    words = ("--prompt", "def merge(", "--max-new-tokens", 8)
    said = recycle("generate", "tiny/family", *words, cwd=tmp_path, env=env)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()


def test_another_push_is_another_commit_without_what_the_run_lacks(
    hub: UploadHub, tmp_path: Path
) -> None:
    run = finished_run(tmp_path)
    there = hub.root / "models" / "tiny" / "family"
    (there / "p8").mkdir(parents=True)
    for file in ("p8/adapter_config.json", "notes.md", "family.json"):
        (there / file).write_text("{}")
    hub.refresh("tiny/family")
    env = environment(hub.url, tmp_path / "home")
    done = recycle("push", run, "tiny/family", cwd=tmp_path, env=env)
    assert "tiny/family exists and gets a new commit: 16 files" in done.stdout, done.stderr
    assert hub.commits[0]["deleted"] == ["p8/adapter_config.json"]
    assert (there / "notes.md").exists()


def test_a_backbone_on_this_machine_has_no_place_and_no_hub_id(
    hub: UploadHub, tmp_path: Path, tiny_folder: Path
) -> None:
    run = finished_run(tmp_path, str(tiny_folder), at=tiny_folder)
    files = contents(run, "tiny/family")
    config = files["p2/adapter_config.json"]
    assert isinstance(config, bytes)
    assert json.loads(config)["base_model_name_or_path"] is None
    card = files["README.md"]
    assert isinstance(card, bytes)
    shown = ModelCard(card.decode()).data.to_dict()
    assert {"base_model", "base_model_relation"}.isdisjoint(shown)
    assert 'recycle.load("tiny/family", backbone="BACKBONE")' in card.decode()
    assert 'AutoModelForCausalLM.from_pretrained("BACKBONE")' in card.decode()


def test_what_names_this_machine_does_not_leave(tmp_path: Path, hub: UploadHub) -> None:
    run = finished_run(tmp_path)
    path = run / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from": f"file://{tmp_path}/x"}))
    with pytest.raises(PublicationError, match=r"^tokenizer_config.json names /"):
        contents(run, "tiny/family")
    path.unlink()
    path.symlink_to(ROOT / "pyproject.toml")
    with pytest.raises(PublicationError, match=r"tokenizer_config.json is a link out of the run"):
        contents(run, "tiny/family")
    path.unlink()
    (run / "p2" / "adapter_model.safetensors").unlink()
    with pytest.raises(PublicationError, match=r"p2/adapter_model.safetensors is missing"):
        contents(run, "tiny/family")
    (run / "results.json").unlink()
    with pytest.raises(PublicationError, match=r"is no finished run"):
        contents(run, "tiny/family")


def test_what_is_refused_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> str:
        with pytest.raises(PublicationError) as refusal:
            push(Path("nowhere"), name, False, Console())
        return str(refusal.value)

    assert refused("family") == "Name the repository OWNER/NAME, got 'family'."
    assert "'tiny/no name' is no name for a repository" in refused("tiny/no name")
    assert refused("tiny/family").startswith("HF_HUB_OFFLINE is set")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("recycle.publish.hub.get_token", lambda: None)
    assert refused("tiny/family").startswith("There is no token for the Hub. Log in")
    monkeypatch.setattr("recycle.publish.hub.get_token", lambda: TOKEN)
    assert refused("tiny/family").startswith("There is no folder nowhere.")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("tiny/family", {"HF_TOKEN": "hf_of_nobody"}, "does not know the token"),
        ("tiny/family", {"HF_TOKEN": READER}, "may not write to tiny/family"),
        ("other/family", {}, "may not write to other/family"),
        ("tiny/family", {"HF_ENDPOINT": "dead"}, "The Hub cannot be reached"),
    ],
)
def test_why_nothing_was_uploaded(
    hub: UploadHub, tmp_path: Path, name: str, changes: dict[str, str], words: str
) -> None:
    run = finished_run(tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        if changes.get("HF_ENDPOINT"):
            changes = {"HF_ENDPOINT": f"http://127.0.0.1:{unused.getsockname()[1]}"}
        env = environment(hub.url, tmp_path / "home", **changes)
        assert_refused(recycle("push", run, name, cwd=tmp_path, env=env), words)
    assert hub.commits == []
    assert hub.objects == {}


def test_files_that_are_no_part_of_a_family_stay(hub: UploadHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    for file in ("token.json", "vocab.json", "aws_config.json", "p2/optimizer.safetensors"):
        (run / file).write_text("{}")
    assert set(contents(run, "tiny/family")) == FILES


def test_a_relative_path_is_cut_and_a_hub_id_is_not(hub: UploadHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    record = results.read(run / "results.json")
    given = {"command": "recycle run tiny/model output.dir=clients/acme/x"}
    results.write(record.model_copy(update=given), run / "results.json")
    content = contents(run, "tiny/family")["results.json"]
    assert isinstance(content, bytes)
    assert json.loads(content)["command"] == "recycle run tiny/model output.dir=x"


def test_text_of_ones_own_stays(hub: UploadHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    record = results.read(run / "results.json")
    sample = results.Sample(prompt="a secret plan", replies={"P = 2": "and so on"})
    results.write(record.model_copy(update={"samples": (sample,)}), run / "results.json")
    files = contents(run, "tiny/family")
    for name in ("results.json", "report.md", "report.html"):
        content = files[name]
        assert isinstance(content, bytes)
        assert b"secret plan" not in content
        assert record.documents[0].name.encode() not in content
    assert b"document 1" in files["results.json"]  # type: ignore[operator]


def link_template(run: Path) -> None:
    (run.parent / "secret").write_text("a secret")
    (run / "chat_template.jinja").unlink()
    (run / "chat_template.jinja").symlink_to(run.parent / "secret")


def swap(run: Path) -> None:
    shutil.copy(run / "p4/adapter_model.safetensors", run / "p2/adapter_model.safetensors")


def write_token(run: Path) -> None:
    (run / "special_tokens_map.json").write_text('{"a": "hf_' + "A" * 30 + '"}')


def name_a_place(run: Path) -> None:
    (run / "special_tokens_map.json").write_text(json.dumps({"a": f"x:{run.parent}/tiny"}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (link_template, "is a link out of the run's folder"),
        (swap, "p2/adapter_model.safetensors is missing or was changed"),
        (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json is missing or was changed"),
        (write_token, "special_tokens_map.json names hf_AAA"),
        (name_a_place, "of this machine or a secret, and nothing was uploaded"),
    ],
)
def test_what_may_not_leave(
    hub: UploadHub, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    run = finished_run(tmp_path)
    spoil(run)
    with pytest.raises(PublicationError, match=words):
        contents(run, "tiny/family")


def test_a_repository_of_something_else_is_left_alone(hub: UploadHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    there = hub.root / "models" / "tiny" / "other"
    there.mkdir(parents=True)
    (there / "weights.bin").write_text("not ours")
    hub.refresh("tiny/other")
    env = environment(hub.url, tmp_path / "home")
    done = recycle("push", run, "tiny/other", cwd=tmp_path, env=env)
    assert_refused(done, "tiny/other holds no family")
    assert hub.commits == []
