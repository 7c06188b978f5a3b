"""Text from a run: what is printed, and what the backbone's own settings must not change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import recycle
from recycle.backbone.fingerprint import fingerprint_model
from recycle.decode import DecodeError, generate_text
from recycle.errors import RecycleError
from recycle.family.adapters import save_family
from tests.adapters import stream_model
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder on a backbone of its own; change either as you like."""
    backbone, folder = save_tiny(tmp_path / "backbone"), tmp_path / "run"
    folder.mkdir()
    save_family(stream_model(adapter_name="nested"), folder, fingerprint_model(backbone))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def generated(run: Path, prompt: str, capsys: Any, **options: Any) -> str:
    generate_text(str(run), prompt, options.pop("p", 4), 8, options.pop("chat", False), **options)
    return capsys.readouterr().out


HOSTILE = {
    "num_beams": 4,
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "repetition_penalty": 50.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 7,
    "max_length": 3,
    "suppress_tokens": list(range(3, 300)),
    "forced_eos_token_id": 5,
    "cache_implementation": "static",
    "prompt_lookup_num_tokens": 2,
    "renormalize_logits": True,
}


@pytest.mark.parametrize("setting", HOSTILE)
def test_the_backbones_generation_settings_change_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    expected = generated(run, "def merge", capsys)
    path = run.parent / "backbone" / "generation_config.json"
    settings = json.loads(path.read_text()) | {setting: HOSTILE[setting]}
    path.write_text(json.dumps(settings))
    assert generated(run, "def merge", capsys) == expected
    assert expected.startswith("def merge")
    assert len(expected) > len("def merge\n")


def test_sampling_is_of_its_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sampled(seed: int, **options: Any) -> str:
        return generated(run, "def merge", capsys, temperature=2.0, seed=seed, **options)

    texts = [sampled(seed) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    greedy = generated(run, "def merge", capsys)
    assert generated(run, "def merge", capsys, temperature=1e-45) == greedy  # no overflow
    assert sampled(1, top_p=1e-6) == greedy  # of the likeliest tokens no more than one
    assert greedy not in texts


def test_compiled_steps_are_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(source: str, p: int, compile: bool | None, **options: Any) -> None:
        seen.append(compile)
        raise InterruptedError

    monkeypatch.setattr("recycle.decode.text.load", load)
    for compile in (None, True, False):
        with pytest.raises(InterruptedError):
            generate_text(str(run), "a", 4, 8, False, compile=compile)
    assert seen == [None, True, False]


def test_the_prompt_comes_after_what_is_said_of_compiling(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = []

    def settings(*_: Any) -> dict[str, Any]:
        before.append(capsys.readouterr().out)
        return {}

    monkeypatch.setattr("recycle.family.model.FamilyModel._settings", settings)
    assert generated(run, "def  merge \n", capsys).startswith("def  merge \n")
    assert before == [""]


def test_settings_that_transformers_refuses_are_one_message(run: Path) -> None:
    path = run.parent / "backbone" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_return_sequences": 2}))
    with pytest.raises(RecycleError, match=r"The backbone .* cannot be loaded: Greedy methods"):
        generate_text(str(run), "a", 4, 8, False)


def test_it_stops_at_the_backbones_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = generated(run, "def merge", capsys)
    tokenizer = AutoTokenizer.from_pretrained(run)
    second = tokenizer(text)["input_ids"][len(tokenizer("def merge")["input_ids"]) + 1]
    path = run.parent / "backbone" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, second]}))
    assert len(generated(run, "def merge", capsys)) < len(text)


def test_a_tokenizer_with_more_inputs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = generated(run, "def merge", capsys)
    path = run / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    assert generated(run, "def merge", capsys) == expected


def test_a_backbone_that_moved(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = generated(run, "def merge", capsys)
    moved = (run.parent / "backbone").rename(run.parent / "moved")
    with pytest.raises(RecycleError, match=r"cannot be read: no such folder.* with --backbone"):
        generate_text(str(run), "def merge", 4, 8, False)
    assert capsys.readouterr().out == ""  # the prompt is not printed before it starts
    assert generated(run, "def merge", capsys, backbone=str(moved)) == expected


@pytest.mark.parametrize(
    ("prompt", "chat", "words"),
    [
        ("", False, "The prompt has no tokens"),
        ("\udcff", False, "not text in UTF-8"),
        ("word " * 2000, False, "the backbone's window is 1024"),
    ],
)
def test_what_cannot_be_gone_on_with(
    run: Path, capsys: pytest.CaptureFixture[str], prompt: str, chat: bool, words: str
) -> None:
    with pytest.raises(DecodeError, match=words):
        generate_text(str(run), prompt, 4, 8, chat)
    assert capsys.readouterr().out == ""


def test_without_a_chat_template(run: Path) -> None:
    (run / "chat_template.jinja").unlink()
    with pytest.raises(DecodeError, match="has no chat template; leave out --chat"):
        generate_text(str(run), "a", 4, 8, True)


def test_a_gpu_is_used_where_there_is_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(source: str, p: int, **options: Any) -> None:
        seen.update(options)
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("recycle.decode.text.load", load)
    with pytest.raises(InterruptedError):
        generate_text(str(run), "a", 4, 8, False)
    assert seen["device_map"] == {"": "cuda"}


# ---- the arithmetic of the run


def record_arithmetic(run: Path, **fields: Any) -> None:
    for path in run.glob("*/adapter_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_family_is_loaded_in_the_dtype_that_it_was_trained_in(run: Path, dtype: str) -> None:
    record_arithmetic(run, backbone_dtype=dtype)
    assert recycle.load(run).dtype == getattr(torch, dtype)
    assert recycle.load(run, dtype=torch.float32).dtype == torch.float32  # an explicit word
    assert recycle.load(run, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("quantization", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")]
)
def test_a_family_is_loaded_in_the_quantisation_that_it_was_trained_on(
    run: Path, quantization: str, kind: str
) -> None:
    record_arithmetic(run, backbone_dtype="float32", backbone_quantization=quantization)
    as_trained = recycle.load(run)
    assert kind in {type(module).__name__ for module in as_trained.modules()}
    plain = recycle.load(run, quantization_config=None)
    assert kind not in {type(module).__name__ for module in plain.modules()}


def test_adapters_that_disagree_are_refused(run: Path) -> None:
    record_arithmetic(run, backbone_dtype="float32")
    path = run / "p2" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"backbone_dtype": "bfloat16"}))
    message = r"disagree in backbone_dtype: \['bfloat16', 'float32'\]"
    with pytest.raises(RecycleError, match=message):
        recycle.load(run)


# ---- folders that are nearly right


def test_adapters_that_peft_saved_are_named_and_load(run: Path, tmp_path: Path) -> None:
    model = recycle.load(run, p=4)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(RecycleError, match=r"It has adapters in nested/, as PEFT's"):
        recycle.load(tmp_path / "saved")
    again = recycle.load(tmp_path / "saved" / "nested", p=2)
    assert recycle.available_p(again) == [1, 2, 4]
    ids = torch.tensor([[5, 6, 7]])
    recycle.set_p(model, 2)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_resized_embeddings_are_named(tmp_path: Path) -> None:
    from peft import PeftModel

    backbone = save_tiny(tmp_path / "backbone", tie_word_embeddings=True)
    model = stream_model(tiny_model(tie_word_embeddings=True))
    model.base_model.model.name_or_path = str(backbone)
    model.resize_token_embeddings(400)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    resized = tiny_model(tie_word_embeddings=True)
    resized.resize_token_embeddings(400)
    PeftModel.from_pretrained(resized, tmp_path / "adapter")
    with pytest.raises(RecycleError, match=r"vocabulary of 400 tokens .*embeddings\(400\)"):
        recycle.load(tmp_path / "adapter", backbone=backbone)
