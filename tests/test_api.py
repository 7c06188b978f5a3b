"""The public API as a user meets it: six lines of Python."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, pipeline
from transformers.utils import logging

import recycle
from recycle.backbone.fingerprint import fingerprint_model
from recycle.family.adapters import save_family
from tests.adapters import stream_model
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    folder.mkdir()
    save_family(stream_model(adapter_name="nested"), folder, fingerprint_model(tiny_folder))
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


def test_six_lines(run_folder):
    model = recycle.load(run_folder, p=4, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(run_folder)("def merge(left", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    four = model.generate(**ids, **options)
    recycle.set_p(model, 2)
    assert recycle.get_p(model) == 2
    assert recycle.available_p(model) == [1, 2, 4]
    two = model.generate(**ids, **options)
    recycle.set_p(model, 1)
    one = model.generate(**ids, **options)
    assert torch.equal(one, tiny_model().generate(**ids, **options))
    assert not torch.equal(one, two)
    assert not torch.equal(two, four)
    recycle.set_p(model, 4)
    assert torch.equal(model.generate(**ids, **options), four)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_gives_the_text_of_generate(run_folder, capfd, batch_size):
    model = recycle.load(run_folder)
    tokenizer = AutoTokenizer.from_pretrained(run_folder, padding_side="left")
    prompts = ["def merge(left", "for name in self.names: raise"]
    logging.set_verbosity_warning()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    logging.set_verbosity_error()
    assert "not supported" not in capfd.readouterr().err
    options = {"max_new_tokens": 8, "do_sample": False}
    texts = {}
    for p in (1, 4):
        recycle.set_p(model, p)
        found = write(prompts, batch_size=batch_size, **options)
        texts[p] = [each[0]["generated_text"] for each in found]
        ids = tokenizer(prompts, return_tensors="pt", padding=True)
        expected = model.generate(**ids, **options)
        assert texts[p] == tokenizer.batch_decode(expected, skip_special_tokens=True)
    with recycle.use_p(model, 1):
        found = write(prompts, batch_size=batch_size, **options)
        assert [each[0]["generated_text"] for each in found] == texts[1]
    assert texts[1] != texts[4]


def test_a_fresh_process_needs_one_import(run_folder):
    code = (
        "import sys, recycle.parscale\n"
        "trainers = {'datasets', 'pydantic', 'matplotlib', 'typer'}\n"
        "print(sorted(trainers & set(sys.modules)))\n"
        "from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(run_folder / 'p2')!r})\n"
        "print(model.active_adapter, recycle.get_p(model))\n"
        f"model = recycle.load({str(run_folder)!r}, p=2)\n"
        "print(model.active_adapter, recycle.get_p(model), recycle.available_p(model))\n"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    assert output.stdout == "[]\ndefault 2\nnested 2 [1, 2, 4]\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'recycle' has no attribute 'nothing'"):
        recycle.nothing  # noqa: B018


def test_no_code_of_a_model_is_ever_run():
    """Every `from_pretrained` that could run code from a repository says that it must not."""
    found = 0
    for path in (Path(recycle.__file__).parent).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = getattr(node.func.value, "id", "")
            if node.func.attr == "from_pretrained" and owner.startswith("Auto"):
                found += 1
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
    assert found >= 4
