"""Several families on one live backbone: added, switched, used in threads, removed."""

import gc
import json
import shutil
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import recycle
from recycle.backbone.fingerprint import fingerprint_model
from recycle.backbone.sample import take_sample
from recycle.family import FamilyError
from recycle.family.adapters import save_family
from recycle.parscale import CacheError, ParScaleError, UnsupportedModelError
from tests.adapters import logits, scramble, stream_config, stream_model, token_ids
from tests.tiny import save_tiny

IDS = token_ids(2, 9)


def write(backbone, folder, seed, p_values=(2, 4), independent=False):
    """Write a family of other values for every seed, with a control."""
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    names = {f"p{p}": (p,) for p in p_values} if independent else {"nested": p_values}
    first, *others = names
    model = stream_model(model, names[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, stream_config(names[name]))
    model.add_adapter("control", stream_config((1,)))
    scramble(model, seed)
    folder.mkdir(parents=True)
    save_family(model, folder, fingerprint_model(backbone))
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("backbone") / "llama", "llama")


@pytest.fixture(scope="module")
def code(backbone, tmp_path_factory):
    return write(backbone, tmp_path_factory.mktemp("code") / "run", seed=3)


@pytest.fixture(scope="module")
def chat(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "run"
    return write(backbone, folder, seed=4, p_values=(2, 8), independent=True)


@pytest.fixture
def model(code, chat):
    model = recycle.load(code, p=4)
    recycle.add_family(model, chat, "chat")
    return model


def outputs(model, family=None):
    found = {}
    for p in recycle.available_p(model, family):
        with recycle.use_p(model, p, family):
            found[p] = logits(model, IDS)
    return found


def snapshot(model):
    """All that a refused family must leave alone."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    names = recycle.families(model), model.active_adapters, sorted(model.peft_config), trained
    return state, (names, recycle.get_p(model), recycle.available_p(model))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_each_p_of_each_family_equals_the_family_alone(model, code, chat, backbone):
    assert recycle.families(model) == ["default", "chat"]
    assert (recycle.get_p(model), recycle.available_p(model)) == (4, [1, 2, 4])
    assert recycle.available_p(model, "chat") == [1, 2, 8]
    assert_equal(outputs(model, "default"), outputs(recycle.load(code)))
    alone = recycle.load(chat)
    assert_equal(outputs(model, "chat"), outputs(alone))
    for each, name in ((model, "chat/control"), (alone, "control")):
        each.set_adapter(name, inference_mode=True)
    assert torch.equal(logits(model, IDS), logits(alone, IDS))
    bare = AutoModelForCausalLM.from_pretrained(backbone)
    assert torch.equal(outputs(model, "chat")[1], logits(bare, IDS))


def test_without_a_name_the_family_in_use_is_meant(model):
    recycle.set_p(model, 8, "chat")
    assert recycle.available_p(model) == [1, 2, 8]
    recycle.set_p(model, 2)
    assert model.active_adapter == "chat/p2"
    recycle.set_p(model, 1)  # of no family
    assert recycle.available_p(model) == [1, 2, 8]
    with recycle.use_p(model, 4, "default"):
        assert recycle.available_p(model) == [1, 2, 4]
        with recycle.use_p(model, 2), recycle.use_p(model, 4):
            assert recycle.get_p(model) == 4
    with pytest.raises(FamilyError, match=r"offers P = 1, 2, 8, got p=4.*\['default'\]; name one"):
        recycle.set_p(model, 4)
    with pytest.raises(FamilyError, match=r"no family 'code'; it has \['default', 'chat'\]"):
        recycle.set_p(model, 4, "code")
    assert recycle.get_p(model) == 1


def test_a_cache_belongs_to_one_family(model):
    with recycle.use_p(model, 2, "chat"), torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    with recycle.use_p(model, 2, "default"), pytest.raises(CacheError, match="'chat/p2'"):
        logits(model, IDS[:, :1], past_key_values=cache)


def test_a_removed_family_frees_its_parameters(code, chat):
    model = recycle.load(code, p=4)
    alone, state = outputs(model), snapshot(model)
    recycle.add_family(model, chat, "chat")
    added = {n: x for n, x in model.named_parameters() if "chat/" in n}
    assert sum(x.numel() for x in added.values()) > 10_000
    gone = [weakref.ref(parameter) for parameter in added.values()]
    del added
    recycle.set_p(model, 8, "chat")
    recycle.remove_family(model, "chat")
    gc.collect()
    assert not any(reference() is not None for reference in gone)
    assert (recycle.families(model), recycle.get_p(model)) == (["default"], 1)
    assert torch.equal(logits(model, IDS), alone[1])
    recycle.set_p(model, 4)  # the family that is left
    found = snapshot(model)
    assert_equal(found[0], state[0])
    assert found[1] == state[1]
    assert_equal(outputs(model), alone)


def test_what_is_in_use_stays_where_another_family_goes(model, code):
    recycle.set_p(model, 2, "chat")
    expected = outputs(model)
    recycle.remove_family(model, "default")
    assert (recycle.families(model), recycle.get_p(model)) == (["chat"], 2)
    assert_equal(outputs(model), expected)
    recycle.add_family(model, code, "default", only=[4])
    assert recycle.families(model) == ["chat", "default"]
    assert recycle.available_p(model, "default") == [1, 4]
    assert recycle.get_p(model) == 2


def test_without_a_family_the_model_is_its_backbone(code, chat, backbone, tmp_path):
    model = recycle.load(code, p=4)
    expected = outputs(model)
    recycle.remove_family(model, "default")
    bare = AutoModelForCausalLM.from_pretrained(backbone)
    assert sum(x.numel() for x in model.parameters()) == bare.num_parameters()
    assert (recycle.families(model), recycle.available_p(model)) == ([], [1])
    recycle.set_p(model, 1)
    assert torch.equal(logits(model, IDS), logits(bare, IDS))
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), bare.generate(IDS, **options))
    with pytest.raises(FamilyError, match=r"This model offers P = 1, got p=4"):
        recycle.set_p(model, 4)
    other = write(save_tiny(tmp_path / "other", "llama", seed=5), tmp_path / "run", seed=3)
    with pytest.raises(FamilyError, match="stands on other weights"):
        recycle.add_family(model, other, "default")
    recycle.add_family(model, code, "default")
    assert recycle.get_p(model) == 1
    assert_equal(outputs(model), expected)


def test_an_added_family_is_saved_by_peft(model, tmp_path, backbone):
    model.save_pretrained(tmp_path)
    loaded = recycle.load(tmp_path / "chat" / "p8", backbone=backbone)
    assert torch.equal(outputs(loaded)[8], outputs(model, "chat")[8])


# ---- what is refused, and leaves everything as it was


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys é", "chat", "default"])
def test_a_name_that_cannot_be_is_refused(model, chat, name):
    with pytest.raises(FamilyError, match=r"not yet taken, got '.*'\. On .*'default', 'chat'"):
        recycle.add_family(model, chat, name)


def test_unknown_families_and_other_models_are_refused(model, chat):
    with pytest.raises(FamilyError, match=r"no family 'x'; it has \['default', 'chat'\]"):
        recycle.remove_family(model, "x")
    with pytest.raises(FamilyError, match=r"no family 'x'"):
        recycle.available_p(model, "x")
    for function in (recycle.add_family, lambda model, *_: recycle.remove_family(model, "x")):
        with pytest.raises(FamilyError, match="gave, got a PeftModelFor"):
            function(stream_model("llama"), chat, "chat")


def change_configs(folder, change):
    for path in folder.glob("*/adapter_config.json"):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def other_backbone(folder):
    change_configs(folder, lambda x: x["fingerprint"].update(samples="0", id="tiny/other"))
    return FamilyError, r"on tiny/other in place of llama, .*are the tensors' values or stored"


def on_a_lora(folder):
    change_configs(folder, lambda x: x.update(adapter_sha256="ab" * 32))
    return FamilyError, r"different are the LoRA \(none here, abababababab there"


def other_values(folder):
    change = {"values": [9.0] * 16}
    change_configs(folder, lambda x: [each.update(change) for each in x["weights"].values()])
    return ParScaleError, "trained on other weights than this model has"


def other_shape(folder):
    change_configs(folder, lambda x: x.update(hidden_size=32, fingerprint=None, weights=None))
    return UnsupportedModelError, "its config has hidden_size=32"


def last_member_torn(folder):
    def change(content):
        if content["num_streams"] == 1:
            content.update(num_virtual_tokens=5, start_token_ids=None)

    change_configs(folder, change)
    return FamilyError, "'chat/control' do not fit its config"


def a_file_missing(folder):
    (folder / "p8" / "adapter_model.safetensors").unlink()
    return FamilyError, r"p8/adapter_model\.safetensors is missing"


@pytest.mark.parametrize(
    "damage",
    [other_backbone, on_a_lora, other_values, other_shape, last_member_torn, a_file_missing],
)
@pytest.mark.parametrize("p", [4, 1])
def test_a_refused_family_leaves_the_model_as_it_was(code, chat, tmp_path, damage, p):
    broken = shutil.copytree(chat, tmp_path / "run")
    kind, message = damage(broken)
    model = recycle.load(code, p=p)
    state, facts = snapshot(model)
    expected = logits(model, IDS)
    with pytest.raises(kind, match=message):
        recycle.add_family(model, broken, "chat")
    found = snapshot(model)
    assert_equal(found[0], state)
    assert found[1] == facts
    assert torch.equal(logits(model, IDS), expected)
    recycle.add_family(model, chat, "chat")
    assert recycle.available_p(model, "chat") == [1, 2, 8]


def test_families_on_one_lora(backbone, chat, tmp_path):
    """What the streams stand on is the LoRA as well."""
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(backbone), LoraConfig())
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    runs = []
    for seed in (3, 4):
        run = tmp_path / f"run{seed}"
        lora.save_pretrained(run / "adapted")
        runs.append(run)
    model = lora.merge_and_unload()
    for seed, run in zip((3, 4), runs, strict=True):
        streams = stream_model(model, adapter_name="nested")
        scramble(streams, seed)
        save_family(streams, run, fingerprint_model(backbone))
        model = streams.unload()
    first, second = (recycle.load(run) for run in runs)
    recycle.add_family(first, runs[1], "second")
    assert_equal(outputs(first, "second"), outputs(second))
    assert take_sample(first.get_base_model()) == take_sample(second.get_base_model())
    with pytest.raises(FamilyError, match="different are the LoRA"):
        recycle.add_family(first, chat, "chat")


# ---- threads


def in_threads(*work):
    """Run each at once; return what they raised."""
    together, raised = threading.Barrier(len(work)), []

    def run(each):
        together.wait()
        try:
            each()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


CHOICES = [(1, "default"), (2, "default"), (4, "default"), (2, "chat")]


def test_every_token_of_every_thread_is_that_of_the_thread_alone(model):
    """Four threads, 50 tokens each, while a fifth sets the model to one P after another."""
    options = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}

    def tokens(p, family):
        with recycle.use_p(model, p, family):
            return model.generate(IDS, **options)

    expected = {choice: tokens(*choice) for choice in CHOICES}
    assert len({tuple(x.flatten().tolist()) for x in expected.values()}) == 4
    found, left = [], threading.Event()

    def generate(choice):
        for _ in range(3):
            found.append((choice, tokens(*choice)))

    def switch():
        turn = 0
        while not left.wait(0.001):
            p, family = CHOICES[turn % 4]
            recycle.set_p(model, p, family)
            assert recycle.get_p(model) == p
            turn += 1
        assert turn > 20

    def all_four():
        try:
            work = [lambda choice=choice: generate(choice) for choice in CHOICES]
            assert in_threads(*work) == []
        finally:
            left.set()

    assert in_threads(all_four, switch) == []
    assert len(found) == 12
    assert all(torch.equal(x, expected[choice]) for choice, x in found)


def test_blocks_nest_and_exceptions_restore(model):
    expected = {choice: outputs(model, choice[1])[choice[0]] for choice in CHOICES}

    def check(p, family):
        assert torch.equal(logits(model, IDS), expected[p, family])

    recycle.set_p(model, 2, "chat")
    with recycle.use_p(model, 4, "default"):
        check(4, "default")
        with recycle.use_p(model, 1):
            check(1, "default")
            with pytest.raises(ZeroDivisionError), recycle.use_p(model, 2, "chat"):
                raise ZeroDivisionError
            check(1, "default")
        check(4, "default")
        with pytest.raises(FamilyError), recycle.use_p(model, 3):
            pass
        check(4, "default")
    check(2, "chat")
