"""ParScale through plain PEFT: create, save, load, several adapters, switch off, take out."""

import copy
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from recycle.family.switch import available_p, get_p, set_p
from recycle.parscale import ParScaleConfig, ParScaleError, UnsupportedModelError
from recycle.parscale import adapter_parameters as adapters_of
from recycle.parscale.decoder import find_decoder
from recycle.parscale.layer import StreamLayer, cut_state
from tests.adapters import logits, scramble, stream_config, stream_model, token_ids
from tests.tiny import save_tiny, tiny_model

TYPES = ["qwen2", "llama", "gpt2"]
IDS = token_ids(2, 9)


def adapter_parameters(model):
    return {name: p for name, p in model.named_parameters() if "parscale_" in name}


# --- P = 1 is the backbone, bit for bit -------------------------------------------------------


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_switched_off_is_the_backbone_bit_for_bit(model_type, attention):
    backbone = tiny_model(model_type, attn_implementation=attention)
    expected = logits(backbone, IDS)
    parameters = {name: p.clone() for name, p in backbone.named_parameters()}
    model = stream_model(backbone)
    assert not torch.equal(logits(model, IDS), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), expected)
    assert not torch.equal(logits(model, IDS), expected)
    set_p(model, 1)
    assert torch.equal(logits(model, IDS), expected)
    unloaded = model.unload()
    assert unloaded is backbone
    assert torch.equal(logits(unloaded, IDS), expected)
    assert not any(isinstance(module, StreamLayer) for module in unloaded.modules())
    assert not unloaded.get_decoder()._forward_pre_hooks
    assert not hasattr(unloaded, "peft_config")
    assert {n: p.shape for n, p in unloaded.named_parameters()} == {
        n: p.shape for n, p in parameters.items()
    }
    assert all(torch.equal(p, parameters[name]) for name, p in unloaded.named_parameters())


def test_unloaded_backbone_takes_a_new_adapter():
    model = stream_model()
    expected = logits(model, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = stream_model(model.unload())
    assert torch.equal(logits(again, IDS), expected)


# --- what is learned --------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("n", [6, 48])
def test_number_of_parameters(p, n):
    model = stream_model("qwen2", p_values=(p,), num_virtual_tokens=n)
    hidden, layers, kv_heads, head = 64, 2, 2, 16
    expected = 2 * p * kv_heads * n * head * layers
    expected += (p * hidden**2 + hidden) + (hidden * p + p)
    assert model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("model_type", TYPES)
def test_a_step_moves_every_adapter_parameter_and_no_bit_of_the_backbone(model_type):
    model = stream_model(model_type, p_values=(4,)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("parscale_" not in name), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_is_float32_on_a_backbone_of_half_precision(dtype, tmp_path):
    model = stream_model(tiny_model("qwen2").to(dtype))
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    output = model(IDS, labels=IDS)
    assert output.logits.dtype == dtype
    output.loss.backward()
    for name, parameter in adapter_parameters(model).items():
        if ".p2_" not in name:  # the aggregator of the P that is not in use
            assert parameter.grad.isfinite().all(), name
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("qwen2").to(dtype), tmp_path)
    assert {p.dtype for p in adapter_parameters(loaded).values()} == {torch.float32}
    assert torch.equal(logits(loaded, IDS), output.logits)


def test_choosing_p_leaves_alone_what_is_trained(tmp_path):
    def trained(model):
        return {name for name, p in model.named_parameters() if p.requires_grad}

    model = stream_model(adapter_name="one")
    assert all(("parscale_" in name) == p.requires_grad for name, p in model.named_parameters())
    model.add_adapter("two", stream_config((8,)))
    assert all((".one" in name) == p.requires_grad for name, p in model.named_parameters())
    chosen = trained(model)
    for p in (8, 1, 2, 8):
        set_p(model, p)
        assert trained(model) == chosen
    model.set_adapter("two")  # PEFT's way trains what it activates
    assert all((".two" in name) == p.requires_grad for name, p in model.named_parameters())
    set_p(model, 2)

    model.save_pretrained(tmp_path, selected_adapters=["one"])
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path / "one")
    for p in (2, 1, 4):
        set_p(frozen, p)
        assert trained(frozen) == set()
    learning = PeftModel.from_pretrained(tiny_model(), tmp_path / "one", is_trainable=True)
    for p in (2, 1, 4):
        set_p(learning, p)
    assert all(("parscale_" in name) == p.requires_grad for name, p in learning.named_parameters())
    learning.train()(IDS, labels=IDS).loss.backward()


# --- save and load ----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}],
    ids=["plain", "low", "train"],
)
def test_saving_and_loading_gives_identical_logits(model_type, options, tmp_path):
    model = stream_model(model_type)
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path, **options).eval()
    assert torch.equal(logits(loaded, IDS), expected)
    set_p(model, 2)
    set_p(loaded, 2)
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_random_start_is_loaded_for_training_without_start_texts(tmp_path):
    model = stream_model(init="random", start_token_ids=None)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_auto_class_finds_the_backbone(tmp_path):
    folder = save_tiny(tmp_path / "backbone", "llama")
    model = stream_model(AutoModelForCausalLM.from_pretrained(folder))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


@pytest.mark.parametrize("model_type", TYPES)
def test_transformers_own_load_adapter(model_type, tmp_path):
    model = stream_model(model_type)
    expected = {}
    for p in (1, 2, 4):
        set_p(model, p)
        expected[p] = logits(model, IDS)
    model.save_pretrained(tmp_path)
    plain = tiny_model(model_type)
    plain.load_adapter(str(tmp_path))
    assert available_p(plain) == [1, 2, 4]
    assert torch.equal(logits(plain, IDS), expected[4])
    for p in (2, 1, 4):
        set_p(plain, p)
        assert get_p(plain) == p
        assert torch.equal(logits(plain, IDS), expected[p])
    plain.disable_adapters()
    assert torch.equal(logits(plain, IDS), expected[1])
    plain.enable_adapters()
    assert torch.equal(logits(plain, IDS), expected[4])


def test_a_device_map_and_a_training_copy(tmp_path):
    model = stream_model()
    model.save_pretrained(tmp_path / "adapter")
    folder = save_tiny(tmp_path / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    loaded = PeftModel.from_pretrained(backbone, tmp_path / "adapter")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    tokens = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.generate(IDS, max_new_tokens=4, do_sample=False))
    twin = copy.deepcopy(loaded)
    assert torch.equal(logits(twin, IDS), logits(model, IDS))


# --- several adapters -------------------------------------------------------------------------


@pytest.fixture
def several():
    """A family of independent P with a control, and the logits of each adapter."""
    model = stream_model(p_values=(2,), adapter_name="p2")
    model.add_adapter("p4", stream_config((4,), num_virtual_tokens=3))
    model.add_adapter("control", stream_config((1,)))
    scramble(model, seed=8)
    expected = {}
    for name in ("control", "p4", "p2"):
        model.set_adapter(name)
        expected[name] = logits(model, IDS)
    with model.disable_adapter():
        expected["backbone"] = logits(model, IDS)
    return model.eval(), expected


def test_each_adapter_is_itself(several):
    model, expected = several
    assert available_p(model) == [1, 2, 4]
    values = list(expected.values())
    for i, first in enumerate(values):
        for second in values[i + 1 :]:
            assert (first - second).abs().max() > 0.05
    for p, name in ((4, "p4"), (2, "p2"), (1, "backbone")):
        set_p(model, p)
        assert get_p(model) == p
        assert torch.equal(logits(model, IDS), expected[name])


def test_the_control_is_reached_by_its_name_also_from_p_1(several):
    model, expected = several
    set_p(model, 1)
    model.set_adapter("control")
    assert torch.equal(logits(model, IDS), expected["control"])
    with pytest.raises(ValueError, match="'control' is active"):
        get_p(model)
    with pytest.raises(ValueError, match="offers P = 1, 2, 4, got p=3"):
        set_p(model, 3)
    set_p(model, 1)
    assert torch.equal(logits(model, IDS), expected["backbone"])
    set_p(model, 2)
    assert torch.equal(logits(model, IDS), expected["p2"])


def test_adding_an_adapter_changes_no_choice(several):
    model, expected = several
    for p, name in ((1, "backbone"), (4, "p4")):
        set_p(model, p)
        model.add_adapter(f"new{p}", stream_config((2, 8)))
        assert get_p(model) == p
        assert torch.equal(logits(model, IDS), expected[name])
    assert available_p(model) == [1, 2, 4, 8]
    set_p(model, 8)
    assert get_p(model) == 8


@pytest.mark.parametrize("active", ["p2", "p4"])
def test_deleting_an_adapter(several, active):
    model, expected = several
    model.set_adapter(active)
    model.delete_adapter("p2")
    assert not any(".p2" in name for name, _ in model.named_parameters())
    assert available_p(model) == [1, 4]
    set_p(model, 4)
    assert torch.equal(logits(model, IDS), expected["p4"])
    with pytest.raises(ValueError, match="offers P = 1, 4, got p=2"):
        set_p(model, 2)
    model.add_adapter("another", stream_config((2,)))
    set_p(model, 2)
    assert get_p(model) == 2
    assert not torch.equal(logits(model, IDS), expected["p4"])


def test_deleting_one_of_two_adapters_of_the_same_p():
    model = stream_model(p_values=(2,), adapter_name="first")
    model.add_adapter("second", stream_config((2,)))
    model.set_adapter("second")
    expected = logits(model, IDS)
    model.delete_adapter("first")
    set_p(model, 1)
    set_p(model, 2)
    assert torch.equal(logits(model, IDS), expected)


def test_the_active_adapter_is_preferred_where_two_have_the_same_p():
    model = stream_model(p_values=(2,), adapter_name="first")
    model.add_adapter("second", stream_config((2,)))
    for name in ("second", "first"):
        model.set_adapter(name)
        expected = logits(model, IDS)
        set_p(model, 1)
        set_p(model, 2)
        assert torch.equal(logits(model, IDS), expected)


# --- what is refused --------------------------------------------------------------------------


def test_merging_is_refused():
    model = stream_model()
    expected = logits(model, IDS)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    assert torch.equal(logits(model, IDS), expected)


def test_a_model_has_one_method_and_a_lora_is_merged_first():
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = stream_model()
    expected = logits(model, IDS)
    with pytest.raises(ParScaleError, match=r"has PARSCALE adapters, and 'x' is LORA\. Merge"):
        model.add_adapter("x", lora)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, IDS), expected)

    adapted = get_peft_model(tiny_model(), lora)
    with pytest.raises(ParScaleError, match=r"has LORA adapters, and 'p2' is PARSCALE\."):
        adapted.add_adapter("p2", stream_config((2,)))
    merged = adapted.merge_and_unload()  # as the message says
    expected = logits(merged, IDS)
    model = stream_model(merged)
    set_p(model, 1)
    assert torch.equal(logits(model, IDS), expected)


def test_a_new_kind_of_layer_is_one_class(tmp_path):
    """It enters, is saved, cut and taken out like the prefix, and nothing else knows of it."""
    wanted = True

    class StreamScale(nn.Module, StreamLayer):
        child_name, group, adapter_layer_names = "scale", "prefix", ("parscale_scale",)

        def __init__(self, mlp, selection):
            nn.Module.__init__(self)
            StreamLayer.__init__(self, selection)
            self.parscale_scale = nn.ParameterDict()

        @staticmethod
        def enters(config, module):
            return wanted and module.endswith(".mlp")

        def add(self, adapter, config, name, device):
            self.device = device
            self.parscale_scale[adapter] = nn.Parameter(torch.rand(config.num_streams, 3))

        @staticmethod
        def cut(leaf, tensor, p):
            return tensor[:p]

    try:
        model = stream_model()
        mlp = model.get_decoder().layers[1].mlp
        assert [x.parameter.shape for x in adapters_of(model, "default")].count((4, 3)) == 2
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
        scale = loaded.get_decoder().layers[1].mlp.scale.parscale_scale["default"]
        assert torch.equal(scale, mlp.scale.parscale_scale["default"])
        cut = cut_state(get_peft_model_state_dict(model), 2)
        assert [len(tensor) for name, tensor in cut.items() if "parscale_scale" in name] == [2, 2]
        model.unload()
        assert not hasattr(mlp, "scale")
    finally:
        wanted = False


def test_adapter_names_are_refused():
    model = stream_model()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="takes no adapter_names"):
            call(input_ids=IDS, adapter_names=["default", "__base__"])


def test_two_active_adapters_are_refused(several):
    model, _ = several
    model.base_model.set_adapter(["p2", "p4"])
    with pytest.raises(ValueError, match=r"One ParScale adapter .* got \['p2', 'p4'\]"):
        model(IDS)
    model.set_adapter("p2")
    model(IDS)


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (ParScaleConfig(num_streams=2), "default", "needs start_token_ids"),
        (stream_config((2,)), "a.b", "has no dots .* got 'a.b'"),
        (stream_config((2,)), "keys", "no attribute of a torch module, got 'keys'"),
        (stream_config((2,)), "copy", "no attribute of a torch module, got 'copy'"),
        (stream_config((2,)), "training", "no attribute of a torch module, got 'training'"),
        (stream_config((2,), hidden_size=65), "default", "hidden_size=65, and this Qwen2"),
        (
            stream_config((2,), attention_shapes={"model.layers.0.self_attn": [2, 16, 16]}),
            "default",
            r"1 attention modules .* and this Qwen2ForCausalLM has 2 attention modules",
        ),
        (
            stream_config((1,), num_virtual_tokens=2, start_token_ids=[[3, 400]]),
            "default",
            "between 0 and 383, got 3 to 400",
        ),
    ],
)
def test_a_refused_adapter_leaves_the_backbone_alone(config, name, message):
    backbone = tiny_model()
    expected = logits(backbone, IDS)
    with pytest.raises(ValueError, match=message):
        get_peft_model(backbone, config, adapter_name=name)
    assert torch.equal(logits(backbone, IDS), expected)
    assert not any(isinstance(module, StreamLayer) for module in backbone.modules())
    model = stream_model()
    expected = logits(model, IDS)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other" if name == "default" else name, config)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, IDS), expected)


def test_a_config_serves_one_shape_of_backbone():
    config = stream_config((2,))
    get_peft_model(tiny_model(), config)
    get_peft_model(tiny_model(seed=5), config)
    with pytest.raises(ValueError, match="and this Qwen2ForCausalLM has 3 attention modules"):
        get_peft_model(tiny_model(num_hidden_layers=3), config)


def test_the_decoder_is_found_where_get_decoder_is_something_else():
    """Llama 4 gives itself, and ModernBERT's decoder its output head, which has that name."""
    sizes = {"head_dim": 16, "num_local_experts": 2, "no_rope_layers": [1, 0]}
    llama = tiny_model("llama4_text", **sizes)
    assert llama.get_decoder() is llama
    assert find_decoder(llama) is llama.model
    bert = tiny_model("modernbert-decoder")
    assert not isinstance(bert.get_decoder(), PreTrainedModel)
    assert find_decoder(bert) is bert.model
    model = stream_model(llama)
    assert find_decoder(model) is llama.model
    assert "streams" in llama.model._modules


def test_a_model_without_a_decoder_below_it_is_refused():
    model = tiny_model()
    model.other = AutoModelForCausalLM.from_config(model.config)
    model.get_decoder = lambda: model
    with pytest.raises(UnsupportedModelError, match="2 models below Qwen2ForCausalLM"):
        get_peft_model(model, stream_config((2,)))
    assert not any(isinstance(module, StreamLayer) for module in model.modules())


def test_a_model_without_attention_is_refused():
    model = tiny_model("mamba", num_key_value_heads=None, state_size=4, head_dim=16)
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM \(model type 'mamba'\)"):
        get_peft_model(model, stream_config((2,)))


def test_a_backbone_without_weights_is_refused():
    config = tiny_model().config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        get_peft_model(model, stream_config((2,)))
