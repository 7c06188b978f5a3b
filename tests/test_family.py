"""A family on disk and back, its members, and the backbone it belongs to."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import recycle
from recycle.backbone import BackboneError
from recycle.backbone.fingerprint import fingerprint_model
from recycle.family import Family, FamilyError
from recycle.family.adapters import load, member_state, save_family
from recycle.family.record import check_source
from recycle.family.switch import available_p, get_p, set_p
from recycle.parscale import ParScaleError, UnsupportedModelError
from tests.adapters import logits, scramble, stream_config, stream_model, token_ids
from tests.tiny import save_tiny, tiny_model

IDS = token_ids(2, 9)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("backbone") / "llama", "llama")


def make(backbone, folder, nested=True, seed=3):
    """Write a family of P = 2, 4 with a control; return the logits of each member."""
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    if nested:
        model = stream_model(model, adapter_name="nested")
    else:
        model = stream_model(model, p_values=(2,), adapter_name="p2")
        model.add_adapter("p4", stream_config((4,), num_virtual_tokens=3))
    model.add_adapter("control", stream_config((1,)))
    scramble(model, seed)
    model.eval()
    expected = {}
    for p in (1, 2, 4):
        set_p(model, p)
        expected[p] = logits(model, IDS)
    model.set_adapter("control")
    expected["control"] = logits(model, IDS)
    folder.mkdir(parents=True)
    save_family(model, folder, fingerprint_model(backbone))
    return expected


@pytest.fixture(scope="module", params=["nested", "independent"])
def family(request, backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / "run"
    return folder, make(backbone, folder, nested=request.param == "nested")


@pytest.fixture(scope="module")
def nested(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested") / "run"
    return folder, make(backbone, folder)


@pytest.fixture
def broken(nested, tmp_path):
    """A copy of a run folder to damage."""
    return shutil.copytree(nested[0], tmp_path / "run")


def test_a_loaded_family_gives_identical_logits_for_every_p(family):
    folder, expected = family
    model = load(folder, dtype=torch.float32)
    assert not model.training
    assert available_p(model) == [1, 2, 4]
    assert get_p(model) == 4
    for p in (4, 2, 1, 4):
        set_p(model, p)
        assert torch.equal(logits(model, IDS), expected[p])
    model.set_adapter("control")
    assert torch.equal(logits(model, IDS), expected["control"])
    with pytest.raises(FamilyError, match="'control' is active"):
        get_p(model)
    for choose in (
        lambda: model.set_adapter("control", inference_mode=True),
        lambda: set_p(model, 4),
    ):
        choose()
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("p", [1, 2, 4])
def test_load_starts_with_the_p_that_was_asked_for(family, p):
    folder, expected = family
    model = load(str(folder), p=p, dtype=torch.float32)
    assert get_p(model) == p
    assert torch.equal(logits(model, IDS), expected[p])


@pytest.mark.parametrize("p", [2, 4])
def test_each_member_is_a_plain_adapter(family, p):
    folder, expected = family
    loaded = [
        load(folder / f"p{p}", dtype=torch.float32),
        AutoPeftModelForCausalLM.from_pretrained(folder / f"p{p}", dtype=torch.float32),
        PeftModel.from_pretrained(tiny_model("llama"), folder / f"p{p}"),
    ]
    for model in loaded:
        assert torch.equal(logits(model, IDS), expected[p])
        assert available_p(model) == [1, p]
    files = {file.name for file in (folder / f"p{p}").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_control_alone(family):
    folder, expected = family
    model = load(folder / "control", dtype=torch.float32)
    assert available_p(model) == [1]
    assert torch.equal(logits(model, IDS), expected["control"])
    set_p(model, 1)
    assert torch.equal(logits(model, IDS), expected[1])
    model.set_adapter("control")
    assert torch.equal(logits(model, IDS), expected["control"])
    with pytest.raises(FamilyError, match="offers P = 1, got p=2"):
        load(folder / "control", p=2)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_nested_p_2_is_an_adapter_of_the_first_two_streams(model_type):
    model = stream_model(model_type, p_values=(2, 4))
    small = stream_model(model_type, p_values=(2,))
    state = member_state(model, "default", 2)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "parscale_" in name:
                parameter.copy_(state[name.replace(".default", "")])
    set_p(model, 2)
    assert torch.equal(logits(model, IDS), logits(small, IDS))
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), small.generate(IDS, **options))


def test_nested_files_hold_the_same_streams(nested):
    small, large = (
        load_file(nested[0] / name / "adapter_model.safetensors") for name in ("p2", "p4")
    )
    prefixes = [name for name in small if "aggregator" not in name]
    assert len(prefixes) == 4
    for name in prefixes:
        assert torch.equal(small[name], large[name][:2])
        assert small[name].dtype == torch.float32


def test_family_file(family, backbone):
    folder, _ = family
    content = json.loads((folder / "family.json").read_text())
    assert content.pop("sha256").keys() == {
        f"{name}/adapter_model.safetensors" for name in ("p2", "p4", "control")
    }
    assert content == {
        "version": 2,
        "p_values": [2, 4],
        "nested": content["nested"],
        "control": True,
        "backbone_trained": False,
    }
    config = json.loads((folder / "p2" / "adapter_config.json").read_text())
    assert config["num_streams"] == 2
    assert config["p_values"] == [2]
    assert config["base_model_name_or_path"] == str(backbone)
    assert config["fingerprint"] == fingerprint_model(backbone).to_dict()
    # Nothing private in what is published; PEFT alone needs the path of a local backbone.
    del config["base_model_name_or_path"]
    for published in (config, content, (folder / "family.json").read_text()):
        assert str(backbone.parent) not in json.dumps(published)


def test_options_go_to_the_backbone(nested):
    model = load(nested[0], dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu")
    assert model.compiles is None
    assert load(nested[0], compile=True).compiles is True
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # a step casts nothing
    close = (logits(model, IDS).float() - nested[1][4]).abs()
    assert close.mean() < 0.1
    assert model.generate(IDS, max_new_tokens=3).shape == (2, 12)


# --- only what is needed ----------------------------------------------------------------------


@pytest.mark.parametrize("only", [[4], [2], [4, 2, 1]])
def test_only_what_is_needed_is_read_and_kept(family, tmp_path, monkeypatch, only):
    """A damaged or missing P that is not needed does not matter."""
    folder = shutil.copytree(family[0], tmp_path / "run")
    kept = sorted({*only} - {1})
    for name in {"p2", "p4", "control"} - {f"p{p}" for p in kept}:
        shutil.rmtree(folder / name)
    (folder / "p8").mkdir()
    (folder / "p8" / "adapter_config.json").write_text("{torn")
    read = []
    from recycle.family import folder as module

    monkeypatch.setattr(module, "load_file", lambda path: [read.append(path), load_file(path)][1])
    model = recycle.load(folder, only=only)
    assert sorted(read) == [folder / f"p{p}" / "adapter_model.safetensors" for p in kept]
    assert available_p(model) == [1, *kept]
    assert get_p(model) == max(kept)
    assert "control" not in model.peft_config
    for p in available_p(model):
        set_p(model, p)
        assert torch.equal(logits(model, IDS), family[1][p])
    streams = {name: x for name, x in model.named_parameters() if "parscale_" in name}
    assert max(x.shape[0] for name, x in streams.items() if "_keys" in name) == max(kept)
    assert all(x.untyped_storage().nbytes() == 4 * x.numel() for x in streams.values())
    aggregators = {name.split(".")[-1][:2] for name in streams if "_hidden_" in name}
    assert aggregators == {f"p{p}" for p in kept}


def test_only_takes_a_list_also_of_what_is_on_the_hub():
    with pytest.raises(FamilyError, match=r"takes a list of values of P.*got only=4"):
        load("tiny/family", only=4)


def test_an_adapter_of_several_p_is_cut(nested, tmp_path, backbone):
    load(nested[0]).save_pretrained(tmp_path)
    model = load(tmp_path / "nested", only=[2], backbone=backbone, dtype=torch.float32)
    assert available_p(model) == [1, 2]
    assert torch.equal(logits(model, IDS), nested[1][2])
    assert {x.shape[0] for n, x in model.named_parameters() if "parscale_keys" in n} == {2}


@pytest.mark.parametrize(
    ("only", "p", "message"),
    [
        ([8], None, r"offers \(1, 2, 4\), at least one of them above 1, got only=\[8\]"),
        ([2, "4"], None, r"got only=\[2, '4'\]"),
        (4, None, r"takes a list of values of P, such as \[4\], got only=4"),
        ([], None, r"got only=\[\]"),
        ([1], None, r"got only=\[1\]\. P = 1 alone needs no adapter: load the backbone with"),
        ([4], 2, r"with only=\[4\] offers P = 1, 4, got p=2"),
        ((2,), 8, r"with only=\[2\] offers P = 1, 2, got p=8"),
    ],
)
def test_what_only_cannot_mean_is_refused_before_anything_is_read(
    nested, tmp_path, only, p, message
):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(nested[0] / "family.json", folder)  # and no weights
    with pytest.raises(FamilyError, match=message):
        load(folder, p, only=only)
    with pytest.raises(FamilyError, match=message):
        check_source(folder, p, only)


def test_only_of_a_trained_backbone_has_no_p_1(broken):
    content = json.loads((broken / "family.json").read_text())
    (broken / "family.json").write_text(json.dumps(content | {"backbone_trained": True}))
    with pytest.raises(FamilyError, match=r"offers \(2, 4\), .*got only=\[1, 4\]"):
        load(broken, only=[1, 4])


def test_only_of_the_control_is_refused(family):
    with pytest.raises(FamilyError, match=r"control offers \(1\), .*got only=\[2\]"):
        load(family[0] / "control", only=[2])


# --- which backbone ---------------------------------------------------------------------------


def test_a_copy_of_the_backbone_is_the_same(nested, backbone, tmp_path):
    copy = shutil.copytree(backbone, tmp_path / "copy")
    model = load(nested[0], backbone=copy, dtype=torch.float32)
    assert torch.equal(logits(model, IDS), nested[1][4])


def test_another_backbone_is_refused_with_both_names(nested, backbone, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    with pytest.raises(FamilyError) as error:
        load(nested[0], backbone=other)
    assert f"trained on the backbone {backbone.name} " in str(error.value)
    assert str(other) in str(error.value)
    assert "values" in str(error.value)


def test_a_backbone_that_has_gone_is_named(broken, backbone, tmp_path):
    where = tmp_path / "gone" / "away" / "model"
    for path in broken.glob("*/adapter_config.json"):
        config = json.loads(path.read_text())
        config["base_model_name_or_path"] = config["fingerprint"]["id"] = str(where)
        path.write_text(json.dumps(config))
    with pytest.raises(FamilyError, match=rf"no such folder: '{where}'.*backbone=\.\.\."):
        load(broken)
    load(broken, backbone=backbone)


def test_a_path_that_was_corrected_in_one_adapter(broken, backbone):
    path = broken / "p2" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": f"{backbone}/."}
    path.write_text(json.dumps(config))
    assert available_p(load(broken)) == [1, 2, 4]


def test_a_kill_leaves_no_adapter_that_is_half_written(nested, tmp_path, monkeypatch):
    from recycle.family.folder import write_adapter

    def killed(config, folder):
        raise KeyboardInterrupt

    config = stream_config()
    monkeypatch.setattr(type(config), "save_pretrained", killed)
    copy = shutil.copytree(nested[0] / "p2", tmp_path / "p2")
    with pytest.raises(KeyboardInterrupt):
        write_adapter(copy, config, {"x": torch.zeros(1)})
    assert [path.name for path in copy.iterdir()] == ["adapter_model.safetensors"]


def test_a_trained_backbone_offers_no_p_1(broken):
    content = json.loads((broken / "family.json").read_text())
    (broken / "family.json").write_text(json.dumps(content | {"backbone_trained": True}))
    for name in ("p2", "p4"):
        path = broken / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"backbone_trained": True}))
    with pytest.raises(FamilyError, match="offers P = 2, 4, got p=1"):
        load(broken, p=1)
    model = load(broken)
    assert available_p(model) == [2, 4]
    with pytest.raises(FamilyError, match="offers P = 2, 4, got p=1"):
        set_p(model, 1)


def test_an_adapter_without_a_fingerprint_goes_by_shapes(tmp_path, backbone):
    model = stream_model(AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32))
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain"), IDS), logits(model, IDS))
    deeper = save_tiny(tmp_path / "deeper", "llama", num_hidden_layers=3)
    with pytest.raises(UnsupportedModelError, match="this LlamaForCausalLM has 3 attention mod"):
        load(tmp_path / "plain", backbone=deeper)


def test_the_home_folder(nested, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(backbone, tmp_path / "model")
    shutil.copytree(nested[0], tmp_path / "run")
    model = load("~/run", backbone="~/model", dtype=torch.float32)
    assert torch.equal(logits(model, IDS), nested[1][4])


def test_the_recorded_commit_holds_where_the_recorded_backbone_is_named(nested, monkeypatch):
    from recycle.family import adapters

    asked = []

    def source_files(location, revision, access):
        asked.append((location, revision))
        raise BackboneError("enough")

    monkeypatch.setattr(adapters, "source_files", source_files)
    config = stream_config(base_model_name_or_path="tiny/model", revision="abc")
    for name in (None, "tiny/model", "tiny/other"):
        with pytest.raises(FamilyError, match="enough"):
            adapters.find_backbone(nested[0], config, "run", name)
    assert asked == [("tiny/model", "abc"), ("tiny/model", "abc"), ("tiny/other", None)]


def test_dtype_auto_is_the_recorded_one(nested, broken):
    for path in broken.glob("*/adapter_config.json"):
        config = json.loads(path.read_text()) | {"backbone_dtype": "bfloat16"}
        path.write_text(json.dumps(config))
    assert load(broken, dtype="auto").dtype == torch.bfloat16
    assert load(broken, torch_dtype="float32").dtype == torch.float32


def test_what_would_be_ignored_is_refused(nested):
    with pytest.raises(FamilyError, match=r"leave out trust_remote_code and use_safetensors"):
        load(nested[0], trust_remote_code=True, use_safetensors=False)
    with pytest.raises(FamilyError, match=r"leave out the revision \('v2'\)"):
        load(nested[0], revision="v2")


# --- around the model -------------------------------------------------------------------------


def test_a_wrapped_model_switches(family):
    folder, expected = family
    model = load(folder, dtype=torch.float32)
    wrapped = torch.nn.ModuleDict({"module": model})
    assert available_p(wrapped) == [1, 2, 4]
    for p in (2, 1, 4):
        set_p(wrapped, p)
        assert get_p(wrapped) == get_p(model) == p
        assert torch.equal(logits(model, IDS), expected[p])
    set_p(wrapped, 2)
    model.add_adapter("other", stream_config((2,), init="random"))  # PEFT activates what it noted
    assert get_p(model) == 2


def test_after_unload_only_what_is_on_the_model_counts(nested):
    model = load(nested[0], dtype=torch.float32)
    bare = model.unload()
    bare.add_adapter(stream_config((2,), init="random"), "new")
    assert available_p(bare) == available_p(model) == [1, 2]
    with pytest.raises(FamilyError, match="offers P = 1, 2, got p=4"):
        set_p(model, 4)


def test_beside_another_method_the_streams_stand_aside(nested, tmp_path):
    model = tiny_model("llama")
    expected = logits(model, IDS)
    model.load_adapter(str(nested[0] / "p4"), "p4")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    model.set_adapter("lora")  # untrained: it adds nothing
    assert get_p(model) == 1
    assert torch.equal(logits(model, IDS), expected)
    set_p(model, 4)
    assert torch.equal(logits(model, IDS), nested[1][4])


# --- what is torn -----------------------------------------------------------------------------


def damage(name):
    def decorate(function):
        DAMAGES[name] = function
        return function

    return decorate


DAMAGES = {}


@damage("family.json is torn")
def _(folder, backbone):
    path = folder / "family.json"
    path.write_text(path.read_text()[:60])
    return "family.json is damaged"


@damage("family.json is of another kind")
def _(folder, backbone):
    (folder / "family.json").write_text("[1, 2]")
    return "family.json is damaged"


@damage("family.json is no text")
def _(folder, backbone):
    (folder / "family.json").write_bytes(b"\xff\xfe\x00")
    return "family.json is damaged"


@damage("family.json lacks a key")
def _(folder, backbone):
    (folder / "family.json").write_text('{"version": 2, "p_values": [2, 4]}')
    return "family.json is damaged: .*nested"


@damage("family.json is of a later version")
def _(folder, backbone):
    (folder / "family.json").write_text('{"version": 3}')
    return "has version 3, this recycle reads version 2"


@damage("weights are truncated")
def _(folder, backbone):
    path = folder / "p4" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "p4/adapter_model.safetensors is not the file that family.json records"


@damage("weights are another run's")
def _(folder, backbone):
    make(backbone, folder.parent / "other", seed=9)
    shutil.copy(folder.parent / "other" / "p2" / "adapter_model.safetensors", folder / "p2")
    return "p2/adapter_model.safetensors is not the file .* comes from another run"


@damage("weights are missing")
def _(folder, backbone):
    (folder / "control" / "adapter_model.safetensors").unlink()
    return "control/adapter_model.safetensors is missing"


@damage("a member is missing")
def _(folder, backbone):
    shutil.rmtree(folder / "p2")
    return "p2/adapter_config.json cannot be read"


@damage("a config is torn")
def _(folder, backbone):
    path = folder / "p4" / "adapter_config.json"
    path.write_text(path.read_text()[:100])
    return "p4/adapter_config.json cannot be read"


@damage("a config is of another kind")
def _(folder, backbone):
    (folder / "p4" / "adapter_config.json").write_text("[]")
    return "p4/adapter_config.json cannot be read"


@damage("a config has a wrong value")
def _(folder, backbone):
    path = folder / "p4" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"smoothing": 3}))
    return r"p4/adapter_config.json cannot be read.*\[0, 1\), got 3"


@damage("a config does not fit its weights")
def _(folder, backbone):
    path = folder / "p4" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"num_virtual_tokens": 5, "start_token_ids": None}
    path.write_text(json.dumps(config))
    return "adapter 'nested' do not fit its config; 4 tensors differ, first .*keys"


@damage("a fingerprint is torn")
def _(folder, backbone):
    for path in folder.glob("*/adapter_config.json"):
        config = json.loads(path.read_text())
        config["fingerprint"].pop("tensors")
        path.write_text(json.dumps(config))
    return "the fingerprint in adapter_config.json is damaged .*'tensors'"


@damage("a config is of another backbone")
def _(folder, backbone):
    path = folder / "p2" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["fingerprint"]["tensors"] = "0"
    path.write_text(json.dumps(config))
    return "disagree in fingerprint"


def change_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_refused(broken, backbone, kind):
    message = DAMAGES[kind](broken, backbone)
    with pytest.raises(FamilyError, match=message):
        load(broken)


def test_a_damaged_adapter_alone_is_refused(broken):
    def poison(state):
        next(tensor for name, tensor in state.items() if "layers.1" in name)[0, 0, 0, 0] = torch.nan

    change_weights(broken / "p2", poison)
    with pytest.raises(FamilyError, match=r"tensor .*layers\.1\..* not finite"):
        load(broken / "p2")
    change_weights(broken / "p4", lambda state: state.pop(next(iter(state))))
    with pytest.raises(FamilyError, match="1 tensors differ"):
        load(broken / "p4")
    path = broken / "control" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FamilyError, match="is damaged"):
        load(broken / "control")


def test_what_is_no_family_is_refused(tmp_path, backbone):
    with pytest.raises(
        FamilyError, match=r"holds neither family\.json .* nor adapter_config\.json"
    ):
        load(tmp_path)
    with pytest.raises(FamilyError, match=r"cannot reach the Hub.* 'no/such-run'"):
        load("no/such-run")
    with pytest.raises(FamilyError, match="is no folder here"):
        load(tmp_path / "no" / "such" / "folder")
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(FamilyError, match="is a LORA adapter; recycle loads ParScale"):
        load(tmp_path / "lora", p=4)
    for function in (available_p, get_p, lambda model: set_p(model, 2)):
        with pytest.raises(ParScaleError, match="has no ParScale adapter"):
            function(lora)


def test_a_p_outside_the_family_is_refused_before_anything_is_loaded(nested):
    with pytest.raises(FamilyError, match="offers P = 1, 2, 4, got p=8"):
        load(nested[0], p=8, backbone="/nowhere/at/all")


def test_the_public_names_are_the_same(nested):
    assert recycle.load is load
    model = recycle.load(nested[0], p=2)
    assert recycle.get_p(model) == 2
    recycle.set_p(model, 4)
    assert recycle.available_p(model) == [1, 2, 4]
    assert Family.read(nested[0]).nested


# --- on the Hub -------------------------------------------------------------------------------


def test_every_file_of_a_tokenizer_is_fetched_and_nothing_that_runs(monkeypatch, tmp_path):
    from fnmatch import fnmatch

    from recycle.backbone import source
    from recycle.family import folder

    asked = {}

    def snapshot_download(repo, allow_patterns, **options):
        asked["patterns"] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(source, "snapshot_download", snapshot_download)
    folder.find_folder("someone/run", None)

    def fetched(name):
        return any(fnmatch(name, pattern) for pattern in asked["patterns"])

    needed = """family.json p2/adapter_config.json p2/adapter_model.safetensors tokenizer.json
    tokenizer_config.json chat_template.jinja chat_template.json vocab.json vocab.txt merges.txt
    special_tokens_map.json added_tokens.json tokenizer.model spiece.model sentencepiece.bpe.model
    additional_chat_templates/tool_use.jinja qwen.tiktoken source.spm tekken.json vocab.bpe
    bpe.codes emoji.json tokenizer.model.v3"""
    assert [name for name in needed.split() if not fetched(name)] == []
    refused = "modeling.py chat_template.py pytorch_model.bin optimizer.pt model.pkl run.sh"
    assert [name for name in refused.split() if fetched(name)] == []
    folder.find_folder("someone/run", None, only=[4, 8])
    needed = """family.json p4/adapter_config.json p8/adapter_model.safetensors adapter_config.json
    adapter_model.safetensors adapted/adapter_model.safetensors adapted/config.json
    backbone/model-00001-of-00002.safetensors tokenizer.json chat_template.jinja"""
    assert [name for name in needed.split() if not fetched(name)] == []
    refused = """p2/adapter_config.json p2/adapter_model.safetensors p16/adapter_config.json
    control/adapter_model.safetensors results.json README.md p4/training.pt"""
    assert [name for name in refused.split() if fetched(name)] == []
