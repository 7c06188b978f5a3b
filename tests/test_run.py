"""The run folder: what a run leaves, when it goes on, and when it is refused."""

import io
import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

import recycle
from recycle import data, results
from recycle.evaluate import measurement
from recycle.family import FamilyError
from recycle.recipe import resolve
from recycle.results import Results
from recycle.run.folder import RunError, find_finished, find_run, finish, kept
from recycle.run.remeasurement import measure_again
from recycle.run.story import run_recipe
from recycle.train import training as train_room
from tests.runs import contents, write_recipe
from tests.tiny import save_tiny


def go(recipe: Path, *overrides: str) -> tuple[Results, str]:
    """Run a recipe in this process; its results and what it printed."""
    console = Console(width=200, record=True, file=io.StringIO())
    found = find_run(resolve(str(recipe), overrides).recipe)
    if found.results is not None:  # as the command shows it
        return found.results, f"{found.folder} is finished"
    record = run_recipe(found, "recycle run tiny.yaml", console)
    return record, console.export_text()


def measure(folder: Path | str, *overrides: str) -> Results:
    """Measure a finished run again, in this process."""
    console = Console(file=io.StringIO())
    return measure_again(find_finished(str(folder), overrides, None), None, "recycle eval", console)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A recipe whose run is finished, in `run` beside it: never change it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, tiny_folder, **{"output.dir": str(folder / "run")})
    go(recipe)
    return recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path) -> Path:
    return write_recipe(tmp_path, tiny_folder, **{"output.dir": str(tmp_path / "run")})


# ---- what it leaves


def test_a_finished_folder(finished: Path) -> None:
    folder = finished.parent / "run"
    files = set(contents(folder)) - {"fitted_law.png"}  # where the losses fall with P
    assert files == {
        "recipe.yaml",
        "results.json",
        "report.md",
        "report.html",
        "README.md",
        *(f"loss_vs_{price}.png" for price in ("streams", "tokens", "memory", "latency")),
        "paper_law.png",
        "stream_weights.png",
        "family.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        *(f"{member}/adapter_config.json" for member in ("p2", "p4", "control")),
        *(f"{member}/adapter_model.safetensors" for member in ("p2", "p4", "control")),
    }
    record = results.read(folder / "results.json")
    assert [model.name for model in record.models] == ["backbone", "control", "P = 2", "P = 4"]
    assert [(t.name, t.p_values, t.steps) for t in record.training] == [
        ("nested", (2, 4), 8),
        ("control", (1,), 8),
    ]
    assert len(record.documents) == 6
    for model in record.models:
        assert f"{model.loss:.4f}" in (folder / "report.md").read_text()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert f"{record.models[-1].loss:.4f}" in card


def test_sizes_in_the_results(finished: Path) -> None:
    folder = finished.parent / "run"
    models = {model.name: model for model in results.read(folder / "results.json").models}
    for name, member in (("control", "control"), ("P = 2", "p2"), ("P = 4", "p4")):
        state = load_file(folder / member / "adapter_model.safetensors")
        assert models[name].adapter_parameters == sum(tensor.numel() for tensor in state.values())
    assert models["backbone"].adapter_parameters == 0
    # keys and values, 2 layers, 2 heads of 16 numbers of 4 bytes
    per_stream = 2 * 2 * 2 * 16 * 4
    held = {name: model.kv_bytes_per_token for name, model in models.items()}
    assert held == {
        "backbone": per_stream,
        "control": per_stream,
        "P = 2": 2 * per_stream,
        "P = 4": 4 * per_stream,
    }


def test_the_losses_are_those_of_the_loaded_family(finished: Path) -> None:
    folder = finished.parent / "run"
    record = results.read(folder / "results.json")
    blocks = _test_blocks(finished)
    model = recycle.load(folder, p=4)
    assert recycle.available_p(model) == [1, 2, 4]
    for row in record.models:
        if row.name == "control":
            model.set_adapter("control")
        else:
            recycle.set_p(model, row.num_streams)
            assert recycle.get_p(model) == row.num_streams
        with torch.no_grad():
            logits = model(input_ids=blocks).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), blocks[:, 1:], reduction="none"
        ).mean(dim=1)
        assert losses.tolist() == pytest.approx(list(row.losses), abs=1e-5)


def _test_blocks(recipe: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    folder = recipe.parent / "run"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    record = results.read(folder / "results.json")
    texts = [(recipe.parent / "texts" / document.name).read_text() for document in record.documents]
    return torch.tensor([tokenizer(text)["input_ids"][:32] for text in texts])


def test_switching_in_the_middle_of_a_generation(finished: Path) -> None:
    model = recycle.load(finished.parent / "run", p=4)
    ids = _test_blocks(finished)[:1]
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    for p in (2, 1, 4):
        recycle.set_p(model, p)
        after = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(before, after)
    with pytest.raises(FamilyError, match="1, 2, 4, got p=3"):
        recycle.set_p(model, 3)


def test_the_saved_recipe_gives_the_same_run(finished: Path, tmp_path: Path) -> None:
    saved = finished.parent / "run" / "recipe.yaml"
    assert resolve(str(saved)).recipe == resolve(str(finished)).recipe  # nothing was left open
    again, _ = go(saved, f"output.dir={tmp_path / 'again'}")
    first = results.read(finished.parent / "run" / "results.json")
    assert [model.losses for model in again.models] == [model.losses for model in first.models]
    assert again.recipe_identity == first.recipe_identity
    for member in ("p2", "p4", "control"):
        weights = f"{member}/adapter_model.safetensors"
        assert contents(tmp_path / "again")[weights] == contents(saved.parent)[weights]


def test_relative_paths_are_settled(
    recipe: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    os.symlink(tiny_folder, "model")
    relative = ("backbone.id=model", "data.path=texts", "training.tokens=128")
    first, _ = go(recipe, *relative)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    saved = recipe.parent / "run" / "recipe.yaml"
    again, _ = go(saved, f"output.dir={tmp_path / 'again'}")
    assert [model.losses for model in again.models] == [model.losses for model in first.models]
    assert again.recipe_identity == first.recipe_identity
    measure(recipe.parent / "run")
    with pytest.raises(RunError, match=r"differs in backbone\.id, data\.path;"):
        go(recipe, *relative)
    monkeypatch.chdir(recipe.parent)
    _, printed = go(recipe, *relative)
    assert "is finished" in printed


def test_what_is_left_open_is_settled_once(recipe: Path) -> None:
    record, _ = go(recipe, "backbone.dtype=auto", "training.tokens=128")
    dtype = record.recipe["backbone"]["dtype"]
    assert dtype == record.backbone.dtype in ("float32", "bfloat16")
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    for same in ("auto", dtype):
        _, printed = go(recipe, f"backbone.dtype={same}", "training.tokens=128")
        assert "is finished" in printed
    with pytest.raises(RunError, match=r"differs in backbone\.dtype;"):
        go(recipe, f"backbone.dtype={other}", "training.tokens=128")


def test_checkpointed_activations_leave_the_cache_to_the_comparison(
    finished: Path, recipe: Path
) -> None:
    record, _ = go(recipe, "training.gradient_checkpointing=true")
    plain = results.read(finished.parent / "run" / "results.json")
    for model, same in zip(record.models, plain.models, strict=True):
        assert model.kv_bytes_per_token == same.kv_bytes_per_token
        assert list(model.losses) == pytest.approx(list(same.losses), abs=1e-5)


def test_training_speed_needs_no_other(finished: Path, recipe: Path) -> None:
    record = results.read(finished.parent / "run" / "results.json")  # evaluation.speed is off
    speeds = {model.name: model.speed for model in record.models}
    assert speeds["P = 2"].train_tokens_per_second == record.training[0].tokens_per_second
    assert speeds["control"].train_tokens_per_second == record.training[1].tokens_per_second
    assert speeds["backbone"] == results.Speed()
    _, printed = go(recipe, "training.tokens=0")
    assert "train tokens/s of P" not in printed


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.block_size=128"], r"data\.block_size = 128\. Set it"),
        (
            ["evaluation.speed=true", "evaluation.prompt_tokens=60", "evaluation.new_tokens=5"],
            r"evaluation\.prompt_tokens \+ evaluation\.new_tokens = 65\. Set it",
        ),
    ],
)
def test_longer_than_the_window(
    recipe: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    model = save_tiny(tmp_path / "gpt2", "gpt2", n_positions=64)
    with pytest.raises(
        RunError, match=rf"gpt2 is 64 tokens \(max_position_embeddings\), and {words}"
    ):
        go(recipe, f"backbone.id={model}", *overrides)
    assert not (recipe.parent / "run").exists()


def test_zero_tokens(recipe: Path) -> None:
    record, _ = go(recipe, "training.tokens=0")
    folder = recipe.parent / "run"
    assert [(t.tokens, t.steps, t.train_loss) for t in record.training] == [(0, 0, ())] * 2
    assert (folder / "report.md").is_file()
    # The prefixes are the keys and values of the start texts, streams 0 and 1 those of P = 4.
    state = {p: load_file(folder / f"p{p}" / "adapter_model.safetensors") for p in (2, 4)}
    keys = next(name for name in state[4] if name.endswith("parscale_keys"))
    assert torch.equal(state[2][keys], state[4][keys][:2])
    assert json.loads((folder / "p4" / "adapter_config.json").read_text())["start_token_ids"]
    losses = {model.name: model.loss for model in record.models}
    assert len(set(losses.values())) == 4


def test_without_a_control_from_random_starts(recipe: Path) -> None:
    record, _ = go(recipe, "stages.streams.control=false", "method.init=random", "streams=2")
    assert [model.name for model in record.models] == ["backbone", "P = 2"]
    assert record.models[1].minus_control is None
    assert not (recipe.parent / "run" / "control").exists()
    assert recycle.available_p(recycle.load(recipe.parent / "run")) == [1, 2]


def test_an_independent_family(recipe: Path) -> None:
    record, _ = go(recipe, "stages.streams.nested=false")
    folder = recipe.parent / "run"
    assert [training.name for training in record.training] == ["p4", "p2", "control"]
    state = {p: load_file(folder / f"p{p}" / "adapter_model.safetensors") for p in (2, 4)}
    keys = next(name for name in state[4] if name.endswith("parscale_keys"))
    assert not torch.equal(state[2][keys], state[4][keys][:2])
    model = recycle.load(folder, p=2)
    blocks = torch.arange(3, 23).unsqueeze(0)
    outputs = {}
    for p in (2, 4, 1, 2):
        recycle.set_p(model, p)
        assert recycle.get_p(model) == p
        logits = model(input_ids=blocks).logits
        assert p not in outputs or torch.equal(logits, outputs[p])
        outputs[p] = logits
    assert not torch.allclose(outputs[2], outputs[4], atol=1e-3)


# ---- going on


def _forbid(*arguments: Any, **options: Any) -> None:
    raise AssertionError("nothing may be loaded or trained")


def test_a_finished_run_is_shown_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished.parent / "run"
    before = contents(folder)
    monkeypatch.setattr("recycle.run.placement.load_backbone", _forbid)
    for overrides in ((), ("logging.steps=5", "launch.device=auto")):
        record, printed = go(finished, *overrides)
        assert record == results.read(folder / "results.json")
        assert "is finished" in printed
    assert contents(folder) == before


def test_another_recipe_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished.parent / "run"
    before = contents(folder)
    monkeypatch.setattr("recycle.run.placement.load_backbone", _forbid)
    with pytest.raises(RunError) as caught:
        go(finished, "streams=2", "training.tokens=4k", "logging.steps=3")
    assert "differs in streams, training.tokens; nothing was changed" in str(caught.value)
    assert contents(folder) == before


def test_an_unfinished_run_of_another_recipe_is_refused(recipe: Path) -> None:
    _break_off(recipe)
    before = contents(recipe.parent / "run")
    with pytest.raises(RunError, match=r"differs in training\.seed;"):
        go(recipe, "training.seed=1")
    assert contents(recipe.parent / "run") == before


def test_foreign_folders_are_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"is no run folder \(it has no recipe\.yaml of a run\)"):
        go(finished, f"output.dir={tmp_path / 'foreign'}")
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(RunError, match="is no run folder"):
        go(finished, f"output.dir={tmp_path / 'foreign' / 'thesis.txt'}")
    with pytest.raises(RunError, match=r"Cannot write in .*: Not a directory"):
        go(finished, f"output.dir={tmp_path / 'foreign' / 'thesis.txt' / 'run'}")
    assert list(contents(tmp_path)) == ["foreign/thesis.txt"]


def test_what_only_looks_like_a_run_is_refused(recipe: Path, tmp_path: Path) -> None:
    """A user's own checkpoints, and a user's own recipe.yaml beside what a run would write."""
    mine = tmp_path / "mine"
    (mine / "checkpoints" / "llama").mkdir(parents=True)
    (mine / "checkpoints" / "llama" / "weights.bin").write_text("precious")
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(recipe, project / "recipe.yaml")
    (project / "README.md").write_text("# mine")
    for folder in (mine, project):
        before = contents(folder)
        with pytest.raises(RunError, match="is no run folder"):
            go(recipe, f"output.dir={folder}")
        assert contents(folder) == before


def test_the_home_folder(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    go(recipe, "output.dir=~/mine", "training.tokens=128")
    assert (tmp_path / "mine" / "results.json").is_file()
    assert not (tmp_path / "~").exists()


def test_a_run_is_no_data(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent / "texts")
    inside = ("data.path=.", "output.dir=runs/tiny", "training.tokens=128")
    first, _ = go(recipe, *inside)
    measure("runs/tiny")
    again, _ = go(recipe, "data.path=**/*", "output.dir=runs/other", "training.tokens=128")
    assert again.data.facts["sha256"] == first.data.facts["sha256"]


def test_a_file_name_that_is_no_text(recipe: Path) -> None:
    for file in sorted((recipe.parent / "texts").iterdir()):
        os.rename(os.fsencode(file), os.fsencode(file.parent) + b"/\xff" + os.fsencode(file.name))
    record, _ = go(recipe, "training.tokens=128")
    assert all(document.name.startswith("\\udcff") for document in record.documents)


def test_a_tokenizer_of_another_model(recipe: Path, tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", vocab_size=100)
    with pytest.raises(RunError, match="has embeddings for 0 to 99 only"):
        go(recipe, f"backbone.id={small}")


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_torn_basis_is_named(recipe: Path, content: str) -> None:
    _break_off(recipe)
    (recipe.parent / "run" / "checkpoints" / "basis.json").write_text(content)
    with pytest.raises(RunError, match=r"basis\.json is damaged"):
        go(recipe)


def test_a_recipe_that_cannot_be_read_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    saved = tmp_path / "run" / "recipe.yaml"
    saved.write_text(saved.read_text()[:120])
    with pytest.raises(RunError, match="cannot be read, so the run cannot be resumed"):
        go(finished, f"output.dir={tmp_path / 'run'}")


def test_a_folder_in_use_is_refused(recipe: Path) -> None:
    folder = recipe.parent / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(_dumped(recipe))
    with (
        FileLock(folder / "checkpoints" / "lock"),
        pytest.raises(RunError, match="Another process is running in"),
    ):
        go(recipe)
    assert contents(folder / "checkpoints").keys() <= {"lock"}
    go(recipe)
    assert not (folder / "checkpoints").exists()


def _dumped(recipe: Path) -> str:
    from recycle.recipe import dump

    return dump(resolve(str(recipe)).recipe)


def _break_off(recipe: Path) -> None:
    """Run until the comparison, which fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "kv_bytes_per_token", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            go(recipe)


def _interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_what_was_trained_is_not_trained_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_off(recipe)
    folder = recipe.parent / "run"
    assert not (folder / "results.json").exists()
    records = [
        json.loads((folder / "checkpoints" / name / "finished" / "training.json").read_text())
        for name in ("nested", "control")
    ]
    monkeypatch.setattr(train_room, "StreamTrainer", _forbid)
    found, printed = go(recipe)
    assert (
        "for training nested on 0 tokens of 1,024, going on from a checkpoint, control on 0 tokens"
        in printed
    )
    assert [training.model_dump(mode="json") for training in found.training] == records
    assert "checkpoints" not in {path.name for path in folder.iterdir()}


def test_torn_trained_weights_are_trained_again(recipe: Path, finished: Path) -> None:
    _break_off(recipe)
    finished_training = recipe.parent / "run" / "checkpoints" / "nested" / "finished"
    trained = finished_training / "learned.safetensors"
    trained.write_bytes(trained.read_bytes()[:-100])
    found, _ = go(recipe)
    whole = results.read(finished.parent / "run" / "results.json")
    for model, same in zip(found.models, whole.models, strict=True):
        assert list(model.losses) == pytest.approx(list(same.losses), abs=1e-6)


def test_an_unfinished_run_goes_on_with_the_data_that_it_read(
    recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has them on disk, tokenised, and reads nothing again."""
    _break_off(recipe)
    for path in (recipe.parent / "texts").rglob("*.txt"):
        path.write_text("something else " * 400)
    monkeypatch.setattr(data, "prepare", None)
    record, _ = go(recipe)
    expected = results.read(finished.parent / "run" / "results.json")
    assert [x.losses for x in record.models] == [x.losses for x in expected.models]


def test_each_process_takes_a_gpu(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(RunError, match=r"3 processes on this machine, and torch sees 2 GPUs"):
        go(recipe, "launch.device=auto")
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("named", "recorded"),
    [("mit", "mit"), (["mit", "apache-2.0"], "mit, apache-2.0"), (None, None)],
)
def test_the_licence_of_a_hub_card(
    named: str | list[str] | None, recorded: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card may name several."""
    from huggingface_hub import DatasetCardData, HfApi

    from recycle.run import materials

    info = type("Info", (), {"card_data": DatasetCardData(license=named)})
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, repository, timeout: info)
    assert materials._hub_licence("a/b", dataset=True) == recorded


def test_the_backbone_is_what_it_was(finished: Path, tmp_path: Path) -> None:
    """A recipe names a folder; the weights in it may have been replaced since."""
    model = save_tiny(tmp_path / "model", seed=1)
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    saved = tmp_path / "run" / "recipe.yaml"
    old = resolve(str(saved)).recipe.backbone.id
    saved.write_text(saved.read_text().replace(old, str(model)))
    with pytest.raises(FamilyError, match=r"was trained on the backbone .* is another backbone"):
        measure(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "1"),
        ("NVIDIA_TF32_OVERRIDE", "1"),
    ],
)
def test_the_environment_does_not_change_the_arithmetic(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=f"The environment sets {name}={value}, which would change"):
        go(recipe)
    assert not (recipe.parent / "run").exists()


def test_what_a_launcher_sets_of_processes_passes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `accelerate launch --cpu` sets it, with mixed precision and compilation off."""
    plain, _ = go(recipe, "training.tokens=128")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": "false",
        "LOCAL_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    again, _ = go(recipe, "training.tokens=128", f"output.dir={recipe.parent / 'launched'}")
    assert [model.losses for model in again.models] == [model.losses for model in plain.models]
    assert not torch.distributed.is_initialized()


def test_nothing_asks_the_hub_after_the_training(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recycle.run import materials, placement, streams

    asked: list[str] = []

    def licence(repository: str, dataset: bool = False) -> str:
        asked.append(repository)
        return "mit"

    def train(*arguments: Any) -> Any:
        assert asked == ["someone/model"]
        monkeypatch.setattr(materials, "_hub_licence", _forbid)
        return train_room.train(*arguments)

    load = placement.load_backbone

    def from_the_hub(*arguments: Any) -> Any:
        model, tokenizer, source = load(*arguments)
        return model, tokenizer, replace(source, id="someone/model", revision="0" * 40)

    monkeypatch.setattr(materials, "_hub_licence", licence)
    monkeypatch.setattr(placement, "load_backbone", from_the_hub)
    monkeypatch.setattr(streams, "train", train)
    record, _ = go(recipe, "training.tokens=128")
    assert record.backbone.license == "mit"


def test_a_report_that_cannot_be_made_loses_no_result(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recycle.run import story

    folder = recipe.parent / "run"
    with monkeypatch.context() as patch:
        patch.setattr(story.report, "write_report", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            go(recipe, "training.tokens=128")
    assert results.read(folder / "results.json").models
    assert not (folder / "README.md").exists()
    finish(find_run(resolve(str(recipe), ["training.tokens=128"]).recipe))
    assert (folder / "README.md").is_file()
    assert not (folder / "checkpoints").exists()


def test_what_an_interruption_left(recipe: Path) -> None:
    folder = recipe.parent / "run"
    assert kept(folder) == "Stopped before the first checkpoint: nothing was kept."
    training = folder / "checkpoints" / "nested"
    (training / "checkpoint-4").mkdir(parents=True)
    assert kept(folder) == "Stopped before the first checkpoint: nothing was kept."
    (training / "checkpoint-4" / "complete").touch()
    assert kept(folder).startswith("Stopped; nested has a checkpoint at step 4. The same command")
    (training / "finished").mkdir()
    assert kept(folder).startswith("Stopped; nested is trained. The same command")


def test_a_new_run_beside_the_old(finished: Path, tmp_path: Path) -> None:
    overrides = ["streams=2", f"output.dir={tmp_path / 'run'}"]
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    recipe = resolve(str(finished), overrides).recipe
    with pytest.raises(RunError, match=r"differs in streams; .* start a new one with --new \(in "):
        find_run(recipe)
    (tmp_path / "run-2").mkdir()
    found = find_run(recipe, new=True)
    assert found.folder == tmp_path / "run-3"
    assert found.results is None


def test_where_only_the_evaluation_differs(finished: Path) -> None:
    with pytest.raises(RunError, match=r"or measure it again with `recycle eval .*run`\."):
        go(finished, "evaluation.compare_learning_rate=1e-2")
