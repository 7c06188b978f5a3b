"""What a config accepts, and that it survives the disk."""

import json

import pytest
import torch
from peft import PeftConfig, PeftType

from recycle.parscale import ParScaleConfig


def test_defaults_are_those_of_the_paper():
    config = ParScaleConfig()
    assert (config.num_streams, config.p_values, config.num_virtual_tokens) == (4, [4], 48)
    assert (config.smoothing, config.init, config.task_type) == (0.1, "text", "CAUSAL_LM")
    assert config.peft_type == PeftType("PARSCALE")
    assert not config.is_prompt_learning


def test_heads_are_sorted():
    assert ParScaleConfig(num_streams=8, p_values=[8, 2, 4]).p_values == [2, 4, 8]


def test_saved_and_read_again_it_is_equal(tmp_path):
    config = ParScaleConfig(
        num_streams=4,
        p_values=[2, 4],
        num_virtual_tokens=3,
        start_token_ids=[[1, 2, 3]] * 4,
        attention_shapes={"model.layers.0.self_attn": [2, 16, 16]},
        fingerprint={"id": "somewhere"},
    )
    config.save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "PARSCALE"
    assert "target_modules" not in content
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(read, ParScaleConfig)
    assert read.to_dict() == config.to_dict() | {"inference_mode": read.inference_mode}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_streams": 0}, "at least 1, got 0 and 48"),
        ({"num_virtual_tokens": 0}, "at least 1, got 4 and 0"),
        ({"num_streams": 4, "p_values": [2, 8]}, r"got p_values=\[2, 8\] and num_streams=4"),
        ({"num_streams": 4, "p_values": [2]}, r"got p_values=\[2\] and num_streams=4"),
        ({"num_streams": 4, "p_values": [4, 4]}, r"p_values are distinct"),
        (
            {"num_streams": 4, "p_values": [1, 4]},
            r"at least 2, got \[1, 4\]. P = 1 is",
        ),
        ({"num_streams": 4, "p_values": [-2, 4]}, r"at least 2, got \[-2, 4\]"),
        ({"smoothing": 1.0}, r"\[0, 1\), got 1.0"),
        ({"smoothing": -0.1}, r"\[0, 1\), got -0.1"),
        ({"init": "zeros"}, "'text' or 'random', got 'zeros'"),
        (
            {"num_streams": 2, "num_virtual_tokens": 3, "start_token_ids": [[1, 2, 3], [1]]},
            r"num_virtual_tokens=3 token ids, got lists of lengths \[3, 1\]",
        ),
        ({"num_streams": 2, "num_virtual_tokens": 1, "start_token_ids": [[1]]}, r"lengths \[1\]"),
    ],
)
def test_a_wrong_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ParScaleConfig(**fields)


def test_start_token_ids_may_be_a_tensor(tmp_path):
    tokens = torch.arange(12).view(2, 6)
    config = ParScaleConfig(num_streams=2, num_virtual_tokens=6, start_token_ids=tokens)
    assert config.start_token_ids == tokens.tolist()
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).start_token_ids == tokens.tolist()
