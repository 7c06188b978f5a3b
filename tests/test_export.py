"""Export into upstream's format: what is written, that import gives it back, and what is refused.

transformers 4.51 itself is no dependency; what it reads is pinned by the golden checkpoints.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import recycle
from recycle.backbone.fingerprint import fingerprint_model
from recycle.errors import RecycleError
from recycle.family import FamilyError
from recycle.family.adapters import member_state, save_family
from recycle.upstream import CheckpointError, export_checkpoint, import_checkpoint
from recycle.upstream import exporter as export
from recycle.upstream.qwen2 import upstream_config
from tests.adapters import logits, scramble, stream_config, stream_model, token_ids
from tests.hub import Hub, hub_environment
from tests.runs import contents, environment
from tests.tiny import save_tiny, tiny_tokenizer

GOLDEN = Path(__file__).parent / "golden"
IDS = token_ids(2, 40)
WEIGHTS = "adapter_model.safetensors"


def rope(kind, **values):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **values}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = rope("yarn", factor=4.0)
YARN_OF_A_RATIO = rope("yarn", factor=16.0, original_max_position_embeddings=64)
DYNAMIC = rope("dynamic", factor=4.0) | {"max_position_embeddings": 16}
BACKBONES = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", YARN),
    "qwen2-yarn-ratio": ("qwen2", YARN_OF_A_RATIO),
    "qwen2-dynamic": ("qwen2", DYNAMIC),
    "llama": ("llama", {}),
    "llama-tied-llama3": ("llama", LLAMA3 | {"tie_word_embeddings": True}),
    "llama-linear": ("llama", rope("linear", factor=3.0)),
}


def save_run(folder, backbone, dtype="float32", p_values=(2, 4), name="nested"):
    """A run folder of a family on a model's folder, and the model that it was saved from."""
    loaded = AutoModelForCausalLM.from_pretrained(backbone, dtype=dtype)
    model = stream_model(loaded, p_values, adapter_name=name, smoothing=0.2)
    folder.mkdir()
    save_family(model, folder, fingerprint_model(backbone))
    return model


def read(folder):
    return json.loads((folder / "config.json").read_text())


def stepwise(model, ids):
    """Logits of the tokens given one at a time after the first three, through the cache."""
    with torch.no_grad():
        output = model(input_ids=ids[:, :3])
        pieces = [output.logits]
        for i in range(3, ids.shape[1]):
            output = model(input_ids=ids[:, i : i + 1], past_key_values=output.past_key_values)
            pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


# --- there and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2-p2", "qwen2-p4-tied"])
def test_a_golden_checkpoint_comes_back_bit_for_bit(name, tmp_path):
    folder = import_checkpoint(GOLDEN / name, tmp_path / "adapter")
    out = export_checkpoint(folder, tmp_path / "out")
    assert read(out) == read(GOLDEN / name)
    weights = [path / "model.safetensors" for path in (GOLDEN / name, out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize("name", BACKBONES)
def test_import_gives_the_adapter_and_its_logits_back(name, tmp_path):
    model_type, overrides = BACKBONES[name]
    backbone = save_tiny(tmp_path / "backbone", model_type, **overrides)
    model = save_run(tmp_path / "run", backbone)
    for p in (2, 4):
        out = export_checkpoint(tmp_path / "run", tmp_path / f"out{p}", p=p)
        config = read(out)
        assert config["parscale_n"] == p
        assert config["parscale_attn_smooth"] == 0.2
        assert config["model_type"] == "qwen2_parscale"
        assert not {"rope_parameters", "dtype", "layer_types", "head_dim"} & config.keys()
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) != bool(
            overrides.get("tie_word_embeddings")
        )
        folder = import_checkpoint(out, tmp_path / f"in{p}")
        expected = member_state(model, "nested", p)
        ours = load_file(folder / WEIGHTS)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected)
        again = recycle.load(folder)
        recycle.set_p(model, p)
        # The order of the same sums differs where a zero bias is added.
        for compute in (logits, stepwise):
            torch.testing.assert_close(compute(again, IDS), compute(model, IDS), atol=1e-5, rtol=0)


def test_the_config_of_transformers_4(tmp_path):
    backbone = save_tiny(tmp_path / "backbone", "llama", **LLAMA3)
    save_run(tmp_path / "run", backbone)
    config = read(export_checkpoint(tmp_path / "run", tmp_path / "out"))
    assert config == {
        **{key: value for key, value in read(GOLDEN / "qwen2-p2").items() if key in config},
        **{"intermediate_size": 128, "max_position_embeddings": 1024, "max_window_layers": 2},
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "num_hidden_layers": 2},
        **{"initializer_range": 0.2, "rope_theta": 5e5, "tie_word_embeddings": False},
        **{"parscale_n": 4, "parscale_n_tokens": 6, "parscale_attn_smooth": 0.2},
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    }
    assert config.keys() == read(GOLDEN / "qwen2-p2").keys()


def test_yarn_as_transformers_4_reads_it(tmp_path):
    """4.51 takes the ratio of the lengths for the factor, unless the original one is left out."""
    scaling = {}
    for name, overrides in {"plain": YARN, "ratio": YARN_OF_A_RATIO}.items():
        config = read(save_tiny(tmp_path / name, **overrides))
        scaling[name] = upstream_config(config, name)["rope_scaling"]
    assert scaling == {
        "plain": {"rope_type": "yarn", "factor": 4.0},
        "ratio": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64},
    }


def test_a_llama_becomes_a_qwen2_with_zero_biases(tmp_path):
    backbone = save_tiny(tmp_path / "backbone", "llama")
    save_run(tmp_path / "run", backbone, p_values=(2,), name="p2")
    theirs = load_file(export_checkpoint(tmp_path / "run", tmp_path / "out") / "model.safetensors")
    ours = load_file(backbone / "model.safetensors")
    assert all(torch.equal(theirs.pop(name), tensor) for name, tensor in ours.items())
    biases = {name: theirs.pop(name) for name in list(theirs) if name.endswith("proj.bias")}
    assert len(biases) == 6
    assert not any(bias.any() for bias in biases.values())
    assert all("prefix_" in name or "aggregate_layer" in name for name in theirs)


def test_a_sharded_backbone_in_half_precision(tmp_path):
    whole = save_tiny(tmp_path / "whole", "llama")
    backbone = tmp_path / "backbone"
    shutil.copytree(whole, backbone, ignore=shutil.ignore_patterns("model*"))
    half = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
    half.save_pretrained(backbone, max_shard_size="60KB")
    shards = {path.name: load_file(path) for path in backbone.glob("*.safetensors")}
    assert len(shards) > 2
    model = save_run(tmp_path / "run", backbone, dtype="bfloat16")

    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert {path.name for path in out.glob("*.safetensors")} == {*shards, export.STREAMS_FILE}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file in held for name in held[file]}
    size = sum(tensor.nbytes for tensors in held.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == size
    for file, tensors in shards.items():
        assert all(torch.equal(held[file][name], tensor) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in held[export.STREAMS_FILE].values()} == {torch.float32}
    assert read(out)["torch_dtype"] == "bfloat16"

    folder = import_checkpoint(out, tmp_path / "in")
    assert {path.name for path in (folder / "backbone").glob("*.safetensors")} == set(shards)
    ours, expected = load_file(folder / WEIGHTS), member_state(model, "nested", 4)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    again = recycle.load(folder)
    assert again.dtype == torch.bfloat16
    recycle.set_p(model, 4)
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_the_backbone_is_recognised(tiny_folder, tmp_path):
    model = save_run(tmp_path / "run", tiny_folder)
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    folder = import_checkpoint(out, tmp_path / "in", backbone=str(tiny_folder))
    again = recycle.load(folder)
    assert recycle.available_p(again) == [1, 4]
    recycle.set_p(model, 4)
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_a_llama_is_recognised(tmp_path):
    backbone = save_tiny(tmp_path / "backbone", "llama", **LLAMA3)
    model = save_run(tmp_path / "run", backbone)
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    again = recycle.load(import_checkpoint(out, tmp_path / "in", backbone=str(backbone)))
    assert recycle.available_p(again) == [1, 4]
    assert again.config.model_type == "llama"
    recycle.set_p(model, 4)
    assert torch.equal(logits(again, IDS), logits(model, IDS))

    state = load_file(out / "model.safetensors")
    state["model.layers.1.self_attn.v_proj.bias"][3] = 1e-3
    save_file(state, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of 27 .*layers.1.self_attn.v_proj.bias is not z"):
        import_checkpoint(out, tmp_path / "other", backbone=str(backbone))


def test_the_tokenizer_is_one_that_transformers_4_loads(tiny_folder, tmp_path):
    save_run(tmp_path / "run", tiny_folder)
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "def merge(left):"
    assert PreTrainedTokenizerFast.from_pretrained(out)(text) == tiny_tokenizer()(text)
    assert (out / "generation_config.json").is_file()
    assert (out / "chat_template.jinja").is_file()


# --- which adapter ----------------------------------------------------------------------------


def test_families_and_adapters(tiny_folder, tmp_path):
    """A folder of one P, a family of independent adapters, and PEFT's own `save_pretrained`."""
    nested = save_run(tmp_path / "run", tiny_folder)
    files = {
        "folder": export_checkpoint(tmp_path / "run" / "p2", tmp_path / "a"),
        "family": export_checkpoint(tmp_path / "run", tmp_path / "b", p=2),
    }
    nested.save_pretrained(tmp_path / "peft")
    adapter = tmp_path / "peft" / "nested"
    files["peft"] = export_checkpoint(adapter, tmp_path / "c", p=2, backbone=tiny_folder)
    written = {(path / "model.safetensors").read_bytes() for path in files.values()}
    assert len(written) == 1

    backbone = AutoModelForCausalLM.from_pretrained(tiny_folder)
    independent = stream_model(backbone, (2,), adapter_name="p2")
    independent.add_adapter("p4", stream_config((4,)))
    independent.add_adapter("control", stream_config((1,)))
    scramble(independent)
    (tmp_path / "family").mkdir()
    save_family(independent, tmp_path / "family", fingerprint_model(tiny_folder))
    for p in (2, 4):
        out = export_checkpoint(tmp_path / "family", tmp_path / f"out{p}", p=p)
        folder = import_checkpoint(out, tmp_path / f"in{p}")
        ours, expected = load_file(folder / WEIGHTS), member_state(independent, f"p{p}", p)
        assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_no_such_p(tiny_folder, tmp_path):
    model = save_run(tmp_path / "run", tiny_folder)
    model.add_adapter("control", stream_config((1,)))
    save_family(model, tmp_path / "run", fingerprint_model(tiny_folder))
    out = tmp_path / "out"
    with pytest.raises(FamilyError, match=r"P = 1 is the untouched backbone.* with P = .*4"):
        export_checkpoint(tmp_path / "run", out, p=1)
    with pytest.raises(FamilyError, match=r"exports with P = .*4, got 8"):
        export_checkpoint(tmp_path / "run", out, p=8)
    for p in (None, 1):
        with pytest.raises(FamilyError, match=r"is a control, one stream with a prefix"):
            export_checkpoint(tmp_path / "run" / "control", out, p=p)
    with pytest.raises(FamilyError, match=r"neither family.json"):
        export_checkpoint(tiny_folder, out)
    assert not out.exists()


# --- which backbone ---------------------------------------------------------------------------


def test_a_backbone_that_moved_or_changed(tmp_path):
    backbone = save_tiny(tmp_path / "backbone")
    other = save_tiny(tmp_path / "other", seed=1)
    run, out = tmp_path / "run", tmp_path / "out"
    save_run(run, backbone)
    moved = backbone.rename(tmp_path / "moved")
    with pytest.raises(FamilyError, match=r"cannot be read: .*/backbone.* with --backbone"):
        export_checkpoint(run, out)
    with pytest.raises(FamilyError, match=r"other is another backbone: the tensors' values"):
        export_checkpoint(run, out, backbone=other)
    export_checkpoint(run, out, backbone=moved)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("model_type", ["mistral", "qwen3", "gpt2"])
def test_other_types_are_refused(model_type, tmp_path):
    backbone = save_tiny(tmp_path / "backbone", model_type)
    save_run(tmp_path / "run", backbone)
    message = rf"type '{model_type}', .* type qwen2 or llama. Use this adapter with recycle.load"
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "run"]


REFUSED = {
    "attention bias": ("llama", {"attention_bias": True}, "attention_bias is True, and must be Fa"),
    "mlp bias": ("llama", {"mlp_bias": True}, "mlp_bias is True, and must be False"),
    "head size": ("llama", {"head_dim": 32}, "head_dim is 32, and must be 16"),
    "activation": ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and must be 'silu'"),
    "window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "use_sliding_window is true, and must be false",
    ),
    "longrope": (
        "llama",
        rope("longrope", factor=4.0, short_factor=[1.0] * 8, long_factor=[2.0] * 8),
        "is of type 'longrope', and must be one of",
    ),
    "yarn": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=64),
        "factor is 4.0, and it takes max_position_embeddings / .* 1024 / 64",
    ),
    "untruncated yarn": ("llama", rope("yarn", factor=4.0, truncate=False), "truncate of the yarn"),
    "part of a head": (
        "llama",
        rope("default", partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5, and must be 1",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_upstream_computes_otherwise_is_refused(kind, tmp_path):
    model_type, overrides, message = REFUSED[kind]
    config = read(save_tiny(tmp_path / "backbone", model_type, **overrides))
    before = json.dumps(config)
    with pytest.raises(CheckpointError, match=message) as error:
        upstream_config(config, "this model")
    assert str(error.value).startswith("this model cannot be computed by upstream's code")
    assert json.dumps(config) == before


def test_all_reasons_come_at_once_and_quantised_weights_are_one(tmp_path):
    config = read(save_tiny(tmp_path, "llama", mlp_bias=True, attention_bias=True))
    config["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError) as error:
        upstream_config(config, "x")
    for key in ("mlp_bias", "attention_bias", "quantization_config"):
        assert key in str(error.value)


@pytest.mark.parametrize("torn", ["nan", "head", "extra", "less", "cut"])
def test_a_torn_backbone_is_refused(torn, tmp_path):
    backbone = save_tiny(tmp_path / "backbone", tie_word_embeddings=torn == "head")
    file = backbone / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if torn == "nan":
        state[name][3, 4] = torch.nan
    elif torn == "head":
        state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2
    elif torn == "extra":
        state["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(64)
    elif torn == "less":
        del state[name]
    save_file(state, file)
    save_run(tmp_path / "run", backbone)
    if torn == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    message = {
        "nan": rf"model.safetensors: tensor {name} has values that are not finite",
        "head": r"tie_word_embeddings.*model.safetensors holds another one, lm_head.weight",
        "extra": r"holds tensor model.layers.1.self_attn.o_proj.bias, which the Qwen2 .* not have",
        "less": rf"lacks tensor {name}",
        "cut": r"model.safetensors is damaged: it ends within tensor \S+, 8 bytes are missing",
    }[torn]
    with pytest.raises(RecycleError, match=message):
        export_checkpoint(tmp_path / "run", tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "run"]


# --- nothing half-written ---------------------------------------------------------------------


def test_nothing_is_overwritten_or_left_behind(tiny_folder, tmp_path, monkeypatch):
    save_run(tmp_path / "run", tiny_folder)
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="mine exists already and is not overwritten"):
        export_checkpoint(tmp_path / "run", tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"mine/out could not be written: .*mine'. Make room"):
        export_checkpoint(tmp_path / "run", tmp_path / "mine" / "out")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_name_tokenizer_class", stop)  # the last of the files
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tmp_path / "run", tmp_path / "new" / "deep" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]


def test_a_full_disk(tiny_folder, tmp_path):
    save_run(tmp_path / "run", tiny_folder)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        for write in (
            lambda: export_checkpoint(tmp_path / "run", disk / "out"),
            lambda: import_checkpoint(GOLDEN / "qwen2-p2", disk / "out"),
        ):
            with pytest.raises(CheckpointError, match=r"could not be written: .*No space left"):
                write()
            assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# --- memory -----------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
import recycle.parscale
from recycle.upstream import export_checkpoint, import_checkpoint

def kilobytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

verb, source, out, *backbone = sys.argv[1:]
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = kilobytes("VmRSS")
if verb == "import":
    import_checkpoint(source, out, backbone=backbone[0] if backbone else None)
else:
    export_checkpoint(source, out)
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's")
def test_peak_memory_is_below_two_shards(tmp_path):
    """Six shards of 40 MB: to import, to compare with a backbone and to export."""
    generator = torch.Generator().manual_seed(0)
    width, inner, vocabulary, layers, p, n = 512, 5888, 20480, 4, 2, 8
    config = read(GOLDEN / "qwen2-p2") | {
        **{"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers},
        **{"vocab_size": vocabulary, "num_attention_heads": 8, "num_key_value_heads": 2},
        **{"parscale_n": p, "parscale_n_tokens": n},
    }
    shapes = {"embed_tokens.weight": (vocabulary, width), "norm.weight": (width,)}
    for layer in range(layers):
        at = f"layers.{layer}"
        shapes |= {f"{at}.mlp.{kind}_proj.weight": (inner, width) for kind in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{at}.self_attn.{kind}_proj.weight": (width, width) for kind in "qo"}
        shapes |= {f"{at}.self_attn.{kind}_proj.weight": (128, width) for kind in "kv"}
        shapes |= {f"{at}.self_attn.{kind}_proj.bias": (128,) for kind in "kv"}
        shapes |= {f"{at}.self_attn.q_proj.bias": (width,)}
        shapes |= {f"{at}.self_attn.prefix_{kind}": (p, 2, n, 64) for kind in "kv"}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{at}.{norm}.weight": (width,) for norm in norms}
    shapes |= {"aggregate_layer.0.weight": (width, p * width), "aggregate_layer.0.bias": (width,)}
    shapes |= {"aggregate_layer.2.weight": (p, width), "aggregate_layer.2.bias": (p,)}
    names = {f"model.{name}": shape for name, shape in shapes.items()}
    names |= {"lm_head.weight": (vocabulary, width)}

    def shard_of(name):
        layer = re.match(r"model\.layers\.(\d)", name)
        number = 2 + int(layer[1]) if layer else 6 if name == "lm_head.weight" else 1
        return f"model-{number:05}-of-00006.safetensors"

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    weight_map = {name: shard_of(name) for name in names}
    for file in set(weight_map.values()):
        shard = {
            name: torch.randn(shape, generator=generator)
            for name, shape in names.items()
            if weight_map[name] == file
        }
        save_file(shard, checkpoint / file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (checkpoint / "config.json").write_text(json.dumps(config))
    sizes = [path.stat().st_size for path in checkpoint.glob("*.safetensors")]
    assert len(sizes) == 6
    assert min(sizes) > 36e6

    def peak(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, arguments)],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    adapter, out = tmp_path / "adapter", tmp_path / "out"
    peaks = {
        "import": peak("import", checkpoint, adapter),
        "compare": peak("import", checkpoint, tmp_path / "other", adapter / "backbone"),
        "export": peak("export", adapter, out),
    }
    assert max(peaks.values()) < 2 * max(sizes), peaks
    assert peaks["import"] > 1e6  # the measurement measures
    for name in ("model.norm.weight", "model.aggregate_layer.0.weight"):
        before = load_file(checkpoint / weight_map[name])[name]
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert torch.equal(load_file(out / index[name])[name], before)


# --- the Hub ----------------------------------------------------------------------------------


def test_from_the_hub_and_back(tiny_folder, tmp_path):
    """A backbone on the Hub, whose tokenizer is fetched, and a checkpoint on the Hub."""
    save_run(tmp_path / "run", tiny_folder)
    shutil.copytree(tiny_folder, tmp_path / "hub" / "models" / "tiny" / "model")
    shutil.copytree(GOLDEN / "qwen2-p2", tmp_path / "hub" / "models" / "tiny" / "golden")
    script = """
import sys
from recycle.upstream import export_checkpoint, import_checkpoint
run, out, golden, here = sys.argv[1:]
export_checkpoint(run, out, p=2, backbone="tiny/model")
export_checkpoint(import_checkpoint("tiny/golden", here), golden)
"""
    out, golden = tmp_path / "out", tmp_path / "golden"
    with Hub(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "run", out, golden, tmp_path / "here"],
            env=environment()
            | hub_environment(hub.url, tmp_path / "home")
            | {"HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    local = export_checkpoint(tmp_path / "run", tmp_path / "local", p=2)
    assert contents(out) == contents(local)
    assert "tokenizer.json" in contents(out)
    theirs = contents(GOLDEN / "qwen2-p2")
    assert contents(golden)["model.safetensors"] == theirs["model.safetensors"]
