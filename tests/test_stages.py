"""Two stages: weights adapt first, streams are put on them; and what stands on what."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import recycle
from recycle import results
from recycle.backbone import BackboneError
from recycle.family import FamilyError
from recycle.parscale import ParScaleError
from recycle.recipe import resolve
from recycle.results import Results
from recycle.run.folder import RunError, find_run
from recycle.run.plan import plan_run
from recycle.upstream import export_adapted, export_checkpoint, import_checkpoint
from tests.runs import ROOT, STEP_TOKENS, contents, texts, write_recipe, write_texts
from tests.test_run import go, measure
from tests.tiny import save_tiny

STAGED: dict[str, Any] = {
    "training.tokens": 10 * STEP_TOKENS,
    "stages.adapt.train": "lora",
    "stages.adapt.rank": 4,
    "stages.adapt.learning_rate": 1e-2,
    "evaluation.compare": ["lora"],
}
IDS = torch.arange(5, 25)[None]


def staged(folder: Path, model: Path, **changes: Any) -> Path:
    """A recipe with both stages, and its run in `run` beside it."""
    return write_recipe(folder, model, **STAGED | {"output.dir": str(folder / "run")} | changes)


@pytest.fixture(scope="module")
def two_stage(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The folder of a finished run through both stages: never change it."""
    recipe = staged(tmp_path_factory.mktemp("two_stage"), tiny_folder)
    go(recipe)
    return recipe.parent / "run"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def backbone(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def record_of(run: Path) -> Results:
    return results.read(run / "results.json")


def losses(run: Path) -> dict[str, tuple[float, ...]]:
    return {model.name: model.losses for model in record_of(run).models}


# ---- what a run leaves


def test_a_run_through_both_stages(two_stage: Path) -> None:
    record = record_of(two_stage)
    names = ["backbone", "P = 1", "LoRA", "control", "P = 2", "P = 4"]
    assert [model.name for model in record.models] == names
    trained = {x.name: (x.steps, x.tokens) for x in record.training}
    assert trained == {
        "compared": (10, 10 * STEP_TOKENS),
        "adapted": (8, 8 * STEP_TOKENS),
        "nested": (2, 2 * STEP_TOKENS),
        "control": (2, 2 * STEP_TOKENS),
    }
    assert {path.parent.name for path in two_stage.glob("*/adapter_model.safetensors")} == {
        *("adapted", "lora", "p2", "p4", "control"),
    }
    assert not (two_stage / "checkpoints").exists()
    by_name = {model.name: model for model in record.models}
    assert by_name["P = 1"].loss < by_name["backbone"].loss - 0.1  # the LoRA learned
    assert by_name["P = 1"].adapter_parameters == by_name["LoRA"].adapter_parameters > 0


def test_the_effort_of_a_row_is_of_all_trainings_behind_it(two_stage: Path) -> None:
    record = record_of(two_stage)
    seconds = {x.name: x.wall_seconds for x in record.training}
    flops = {x.name: x.tokens * (x.flops_per_token or 0) for x in record.training}
    rows = {model.name: model for model in record.models}
    assert rows["backbone"].train_seconds is None
    assert rows["P = 1"].train_seconds == seconds["adapted"]
    assert rows["LoRA"].train_flops == flops["compared"]
    assert rows["P = 4"].train_seconds == pytest.approx(seconds["adapted"] + seconds["nested"])
    assert rows["P = 2"].train_flops == pytest.approx(flops["adapted"] + flops["nested"])
    assert flops["adapted"] > 0


def test_the_backbone_is_measured_before_it_is_adapted(two_stage: Path, tiny_folder: Path) -> None:
    other = two_stage.parent / "plain"
    recipe = write_recipe(
        two_stage.parent, tiny_folder, **{"training.tokens": 0, "output.dir": str(other)}
    )
    go(recipe)
    assert losses(other)["backbone"] == pytest.approx(losses(two_stage)["backbone"], abs=1e-6)


def test_it_is_measured_again(two_stage: Path) -> None:
    again = measure(two_stage)
    assert {x.name: x.losses for x in again.models} == losses(two_stage)


# ---- loading


def test_p_1_is_the_adapted_model_however_it_is_loaded(two_stage: Path, tiny_folder: Path) -> None:
    model = recycle.load(two_stage, p=1)
    assert recycle.available_p(model) == [1, 2, 4]
    adapted = logits(model)
    merged = PeftModel.from_pretrained(backbone(tiny_folder), two_stage / "adapted")
    assert torch.equal(adapted, logits(merged.merge_and_unload()))
    recycle.set_p(model, 4)
    streams = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), adapted)
    assert torch.equal(logits(recycle.load(two_stage / "p4")), streams)
    assert not torch.equal(streams, adapted)
    assert not torch.allclose(adapted, logits(backbone(tiny_folder)), atol=0.1)


def test_other_weights_are_refused_with_the_lines_that_load_the_right_ones(
    two_stage: Path, tiny_folder: Path
) -> None:
    model = backbone(tiny_folder)
    with pytest.raises(ParScaleError, match="trained on other weights") as refused:
        PeftModel.from_pretrained(model, two_stage / "p4")
    lines = [line.strip() for line in str(refused.value).splitlines() if "model =" in line]
    scope: dict[str, Any] = {"PeftModel": PeftModel, "model": model}
    exec("\n".join(lines).replace("RUN", str(two_stage)), scope)
    assert torch.equal(logits(scope["model"]), logits(recycle.load(two_stage)))
    PeftModel.from_pretrained(backbone(tiny_folder), two_stage / "adapted")  # alone it is fine


def test_a_model_of_other_values_is_refused(two_stage: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(ParScaleError, match="trained on other weights"):
        PeftModel.from_pretrained(backbone(other), two_stage / "p4")
    with pytest.raises(FamilyError, match="another backbone"):
        recycle.load(two_stage, backbone=other)


def test_another_dtype_is_the_same_model(two_stage: Path) -> None:
    found = logits(recycle.load(two_stage, dtype=torch.bfloat16)).float()
    assert (found - logits(recycle.load(two_stage))).abs().mean() < 0.05  # rounding


@pytest.mark.parametrize("damage", ["missing", "torn", "half"])
def test_adapted_weights_that_are_not_there_or_not_whole(
    two_stage: Path, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_stage, run)
    weights = run / "adapted" / "adapter_model.safetensors"
    if damage == "missing":
        shutil.rmtree(run / "adapted")
    elif damage == "half":
        (run / "adapted" / "adapter_config.json").unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    words = "SHA-256 differs" if damage == "torn" else "there is no"
    with pytest.raises(FamilyError, match=words):
        recycle.load(run)


def test_a_quantised_backbone_keeps_the_lora_beside_it(tmp_path: Path, tiny_folder: Path) -> None:
    go(staged(tmp_path, tiny_folder, **{"backbone.quantization": "nf4"}))
    run = tmp_path / "run"
    assert {x.name: x.losses for x in measure(run).models} == losses(run)
    model = recycle.load(run)
    streams = logits(model)
    recycle.set_p(model, 1)
    adapted = logits(model)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    bare = AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=nf4, dtype=torch.float32
    )
    with pytest.raises(ParScaleError, match=r"adapted\"\).get_base_model"):
        PeftModel.from_pretrained(bare, run / "p4")
    with_lora = PeftModel.from_pretrained(bare, run / "adapted")
    both = PeftModel.from_pretrained(with_lora.get_base_model(), run / "p4")
    assert torch.equal(logits(both), streams)
    with both.disable_adapter():
        assert torch.equal(logits(both), adapted)
    merged = logits(recycle.load(run, quantization_config=None, p=1))
    unadapted = logits(backbone(tiny_folder))
    assert (merged - adapted).abs().mean() < (unadapted - adapted).abs().mean()  # nf4 rounds


# ---- all weights


def test_all_weights_at_p_1(tmp_path: Path, tiny_folder: Path) -> None:
    changes = {"stages.adapt.train": "full", "stages.adapt.learning_rate": 1e-3}
    go(staged(tmp_path, tiny_folder, **changes, **{"backbone.dtype": "bfloat16"}))
    run = tmp_path / "run"
    rows = {model.name: model for model in record_of(run).models}
    assert list(rows) == ["backbone", "P = 1", "all weights", "control", "P = 2", "P = 4"]
    assert rows["P = 1"].loss < rows["backbone"].loss - 0.05
    adapted = AutoModelForCausalLM.from_pretrained(run / "adapted", dtype=torch.bfloat16)
    model = recycle.load(run)
    streams = logits(model)
    recycle.set_p(model, 1)
    assert torch.equal(logits(model), logits(adapted))
    assert torch.equal(logits(PeftModel.from_pretrained(adapted, run / "p4")), streams)
    with pytest.raises(ParScaleError, match="trained on other weights"):
        PeftModel.from_pretrained(backbone(tiny_folder), run / "p4")
    assert {x.name: x.losses for x in measure(run).models} == losses(run)


def test_all_weights_with_the_streams(tmp_path: Path, tiny_folder: Path) -> None:
    changes = {
        "stages.adapt.train": "none",
        "stages.streams.train": "all",
        "stages.streams.weights_learning_rate": 1e-3,
    }
    go(staged(tmp_path, tiny_folder, **changes))
    run = tmp_path / "run"
    rows = {model.name: model for model in record_of(run).models}
    assert list(rows) == ["backbone", "all weights", "P = 2", "P = 4"]
    model = recycle.load(run)
    assert recycle.available_p(model) == [2, 4]
    with pytest.raises(FamilyError, match="offers P = 2, 4"):
        recycle.set_p(model, 1)
    trained, untouched = backbone(run / "backbone"), backbone(tiny_folder)
    for (name, new), old in zip(trained.named_parameters(), untouched.parameters(), strict=True):
        assert not torch.equal(new, old), name
    assert {x.name: x.losses for x in measure(run).models} == losses(run)
    checkpoint = export_checkpoint(run, tmp_path / "upstream", p=4)
    folder = import_checkpoint(checkpoint, tmp_path / "back")
    assert folder is not None
    assert torch.allclose(logits(recycle.load(folder)), logits(model), atol=1e-5)


# ---- weights from elsewhere


def test_a_lora_from_elsewhere(two_stage: Path, tmp_path: Path, tiny_folder: Path) -> None:
    changes = {"stages.adapt.train": None, "backbone.adapter": str(two_stage / "adapted")}
    go(staged(tmp_path, tiny_folder, **changes, **{"evaluation.compare": []}))
    run = tmp_path / "run"
    assert [x.name for x in record_of(run).training] == ["nested", "control"]
    assert losses(run)["P = 1"] == losses(two_stage)["P = 1"]


def lora(folder: Path, model: Any, **options: Any) -> Path:
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(folder)
    return folder


def test_a_lora_that_cannot_be_used(tmp_path: Path, tiny_folder: Path) -> None:
    wide = save_tiny(tmp_path / "wide", hidden_size=96)
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    cases = {
        lora(tmp_path / "of_wide", backbone(wide)): "does not fit the backbone",
        lora(tmp_path / "layers", backbone(tiny_folder), layers_to_transform=[0]): None,
        tmp_path: "has no adapter_config.json",
    }
    soft = get_peft_model(
        backbone(tiny_folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    soft.save_pretrained(tmp_path / "soft")
    cases[tmp_path / "soft"] = "is a PROMPT_TUNING adapter"
    pickled = lora(tmp_path / "pickled", backbone(tiny_folder))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    cases[pickled] = "has no adapter_model.safetensors"
    cut = lora(tmp_path / "cut", backbone(tiny_folder))
    config = json.loads((cut / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "v_proj", "gate_proj"]
    (cut / "adapter_config.json").write_text(json.dumps(config))
    cases[cut] = "tensors differ"
    from recycle.backbone.lora import put_lora

    for folder, words in cases.items():
        if words is None:
            put_lora(backbone(tiny_folder), folder)
            continue
        with pytest.raises(BackboneError, match=words):
            put_lora(backbone(tiny_folder), folder)
    # Of a LoRA that changes much, rounding in bfloat16 is more, and no fault.
    strong = get_peft_model(backbone(tiny_folder), LoraConfig(task_type="CAUSAL_LM"))
    for name, parameter in strong.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    strong.save_pretrained(tmp_path / "strong")
    put_lora(backbone(tiny_folder).bfloat16(), tmp_path / "strong")
    head = get_peft_model(
        backbone(tied), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    )
    nn.init.normal_(head.base_model.model.lm_head.lora_B["default"].weight)
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(BackboneError, match="cannot be merged"):
        put_lora(backbone(tied), tmp_path / "head")


def test_streams_go_on_from_a_family(two_stage: Path, tmp_path: Path, tiny_folder: Path) -> None:
    changes = {
        "stages.adapt.train": None,
        "evaluation.compare": [],
        "stages.streams.start": str(two_stage),
        "streams": [2],
    }
    go(staged(tmp_path, tiny_folder, **changes))
    run = tmp_path / "run"
    assert losses(run)["P = 1"] == losses(two_stage)["P = 1"]
    before = {x.name: x.curve[-1].validation_loss for x in record_of(two_stage).training}
    started = {x.name: x.curve[0].validation_loss for x in record_of(run).training}
    assert started["nested"]["P = 2"] == pytest.approx(before["nested"]["P = 2"], abs=1e-6)
    assert started["control"] == pytest.approx(before["control"], abs=1e-6)
    other = {"streams": [8], "output.dir": str(tmp_path / "other")}
    with pytest.raises(FamilyError, match=r"not for P = \[8\]"):
        go(staged(tmp_path, tiny_folder, **changes | other))
    other = {"method.smoothing": 0.2, "output.dir": str(tmp_path / "another")}
    with pytest.raises(FamilyError, match=r"smoothing = 0\.1, and method\.smoothing = 0\.2"):
        go(staged(tmp_path, tiny_folder, **changes | other))


# ---- export


def test_the_adapted_model_as_an_ordinary_checkpoint(two_stage: Path, tmp_path: Path) -> None:
    folder = export_adapted(two_stage, tmp_path / "adapted")
    assert torch.equal(logits(backbone(folder)), logits(recycle.load(two_stage, p=1)))
    assert (folder / "tokenizer.json").is_file()
    checkpoint = export_checkpoint(two_stage, tmp_path / "upstream", p=2)
    back = import_checkpoint(checkpoint, tmp_path / "back")
    assert back is not None
    expected = logits(recycle.load(two_stage, p=2))
    assert torch.allclose(logits(recycle.load(back)), expected, atol=1e-5)


# ---- plans and repetition


def test_a_finished_first_stage_is_not_repeated(
    two_stage: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    shutil.copytree(two_stage.parent, tmp_path, dirs_exist_ok=True)
    changes = {"training.tokens": None, "stages.adapt.tokens": 8 * STEP_TOKENS}
    changes |= {"stages.streams.tokens": STEP_TOKENS, "evaluation.compare": []}
    new = str(tmp_path / "run-2")
    _, told = go(staged(tmp_path, tiny_folder, **changes, **{"output.dir": new}))
    assert "which learned the same" in told
    first, again = (contents(run / "adapted") for run in (tmp_path / "run", tmp_path / "run-2"))
    assert first == again
    other = {"stages.adapt.rank": 2, "output.dir": str(tmp_path / "run-3")}
    _, told = go(staged(tmp_path, tiny_folder, **changes | other))
    assert "which learned the same" not in told


def test_a_stage_with_data_of_its_own(tmp_path: Path, tiny_folder: Path) -> None:
    write_texts(tmp_path / "first", 30)
    (tmp_path / "first" / "00.txt").write_text((tmp_path / "first" / "01.txt").read_text()[::-1])
    own = {"source": "files", "path": str(tmp_path / "first"), "block_size": 16}
    own |= {"validation_documents": 2, "test_documents": 2}
    changes = {f"stages.adapt.data.{key}": value for key, value in own.items()}
    write_texts(tmp_path / "texts", 60)
    go(staged(tmp_path, tiny_folder, **changes))
    record = record_of(tmp_path / "run")
    assert record.adapt_data is not None
    assert (record.adapt_data.path, record.data.path) == (
        str(tmp_path / "first"),
        str(tmp_path / "texts"),
    )
    trained = {x.name: x.tokens for x in record.training}
    assert trained["adapted"] == 8 * STEP_TOKENS
    assert trained["compared"] == 8 * STEP_TOKENS + 2 * STEP_TOKENS - STEP_TOKENS


def test_tasks_tell_how_many_answers_are_right(tmp_path: Path, tiny_folder: Path) -> None:
    changes = {"data.source": "tasks", "data.path": None, "data.conversations": 200}
    changes |= {"data.block_size": 64, "evaluation.compare": [], "streams": [2]}
    record, told = go(staged(tmp_path, tiny_folder, **changes))
    assert all(model.right is not None and len(model.right) == 6 for model in record.models)
    assert "right" in told


def test_float16_is_no_format_to_learn_all_weights_in(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = staged(
        tmp_path, tiny_folder, **{"stages.adapt.train": "full", "backbone.dtype": "float16"}
    )
    with pytest.raises(RunError, match=r"backbone\.dtype=float16"):
        plan_run(find_run(resolve(str(recipe)).recipe))


def test_a_share_of_the_loss_is_each_streams_own(tmp_path: Path, tiny_folder: Path) -> None:
    changes = {"stages.adapt.train": "none", "evaluation.compare": [], "streams": [2]}
    changes |= {"stages.streams.control": False}
    spread = {}
    for own in (0.0, 1.0):
        out = {"stages.streams.own_loss": own, "output.dir": str(tmp_path / f"run-{own:.0f}")}
        go(staged(tmp_path, tiny_folder, **changes | out))
        state = recycle.load(tmp_path / f"run-{own:.0f}").state_dict()
        moved = [x for name, x in state.items() if "output_weight" in name]
        spread[own] = sum(float(x.abs().sum()) for x in moved)
    assert spread[0.0] > 0  # the aggregator learns what is merged,
    assert spread[1.0] == 0  # and nothing of what each stream does alone


def test_what_was_predicted_is_counted(two_stage: Path) -> None:
    for training in record_of(two_stage).training:  # of every block of 32 all tokens but the first
        assert training.learned_tokens == training.tokens * 31 // 32
        assert training.master_dtype is None


EXPERIMENTS = sorted((ROOT / "scripts/experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs(path: Path, tmp_path: Path, tiny_folder: Path) -> None:
    """At tiny size: its recipe alone is what is under test."""
    write_texts(tmp_path / "train", 60)
    for number, text in enumerate(texts(4, seed=7)):
        (tmp_path / f"eval-{number}.txt").write_text(text)
    recipe = resolve(str(path)).recipe
    small = {
        "backbone.id": tiny_folder,
        "data.path": tmp_path / "train",
        "data.test_path": tmp_path / "eval-*.txt",
        "data.block_size": 32,
        "data.validation_documents": 2,
        "data.test_documents": 4,
        "method.num_virtual_tokens": 4,
        "training.batch_size": 2,
        "training.micro_batch_size": 2,
        "output.dir": tmp_path / "run",
        "launch.device": "cpu",
    }
    if recipe.training.tokens is not None:
        small["training.tokens"] = 512
    if recipe.stages.adapt.tokens:
        small["stages.adapt.tokens"] = 256
    record, _ = go(path, *(f"{key}={value}" for key, value in small.items()))
    assert [x.num_streams for x in record.models if x.num_streams > 1] == [2, 4, 8]
    assert all(x.streams is not None for x in record.models if x.num_streams > 1)


def test_text_first_and_conversations_then(tmp_path: Path, tiny_folder: Path) -> None:
    """The comparison reads the rows of both in their order, and chooses as the streams do."""
    own = {"source": "tasks", "block_size": 64, "validation_documents": 4, "test_documents": 4}
    changes = {f"stages.streams.data.{key}": value for key, value in own.items()}
    record, _ = go(staged(tmp_path, tiny_folder, **changes))
    by_name = {x.name: x for x in record.training}
    last = by_name["compared"].curve[0].validation_loss["LoRA"]
    text, chat = (by_name[x].curve[0].validation_loss for x in ("adapted", "nested"))
    assert last != text["P = 1"]  # the validation documents are those of the conversations
    assert len(chat) == 2
    assert all(model.right is not None for model in record.models)


def test_a_folder_of_that_name_is_not_taken_for_a_backbone(two_stage: Path, tmp_path: Path) -> None:
    shutil.copytree(two_stage, tmp_path / "run")
    export_adapted(two_stage, tmp_path / "adapted")  # beside a run that stands on a LoRA
    assert torch.equal(logits(recycle.load(tmp_path / "run")), logits(recycle.load(two_stage)))


def test_streams_of_one_p_each_are_not_nested(tmp_path: Path, tiny_folder: Path) -> None:
    alone = {"stages.adapt.train": "none", "evaluation.compare": [], "training.tokens": 0}
    go(staged(tmp_path, tiny_folder, **alone, **{"stages.streams.nested": False}))
    changes = {"stages.adapt.train": None, "output.dir": str(tmp_path / "next")}
    changes |= {"stages.streams.start": str(tmp_path / "run")}
    with pytest.raises(FamilyError, match="streams of its own, which cannot be nested"):
        go(staged(tmp_path, tiny_folder, **alone | changes))
    changes |= {"stages.streams.nested": False}
    record, _ = go(staged(tmp_path, tiny_folder, **alone | changes))
    assert losses(tmp_path / "next") == losses(tmp_path / "run")
    assert [x.name for x in record.training] == ["p4", "p2", "control"]


def test_what_cannot_be_brought_is_told_before_anything_is_written(
    two_stage: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    deep = save_tiny(tmp_path / "deep", num_hidden_layers=3)
    other = lora(tmp_path / "of_deep", backbone(deep))
    changes = {"stages.adapt.train": None, "backbone.adapter": str(other)}
    with pytest.raises(BackboneError, match="is of another backbone"):
        go(staged(tmp_path, tiny_folder, **changes))
    changes = {"stages.adapt.train": None, "stages.streams.start": str(two_stage)}
    with pytest.raises(FamilyError, match="was trained on the backbone"):
        go(staged(tmp_path, deep, **changes))
    assert not (tmp_path / "run").exists()
