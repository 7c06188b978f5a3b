"""What a family of P = 2, 4, 8 adds to its backbone: parameters of adapters on the meta device.

python scripts/measure_family_memory.py [--out FILE.json]
"""

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recycle.parscale import ParScaleConfig, adapter_parameters

LAYOUTS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        **{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
        **{"vocab_size": 49152, "tie_word_embeddings": True},
    },
    "Qwen2.5-3B": {
        **{"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008},
        **{"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
        **{"vocab_size": 151936, "tie_word_embeddings": True},
    },
}


def add_streams(model: PreTrainedModel, adapters: dict[str, list[int]]) -> PeftModel:
    """Put adapters of these P on a model, with random starts."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    shape = [config.num_key_value_heads, size, size]
    shapes = {f"model.layers.{i}.self_attn": shape for i in range(config.num_hidden_layers)}
    found = {"decoder": "model", "hidden_size": config.hidden_size, "attention_shapes": shapes}
    made = [
        (name, ParScaleConfig(num_streams=p[-1], p_values=p, init="random", **found))
        for name, p in adapters.items()
    ]
    peft_model = get_peft_model(model, made[0][1], made[0][0])
    for name, adapter in made[1:]:
        peft_model.add_adapter(name, adapter)
    return peft_model


def count(layout: dict[str, Any]) -> dict[str, int]:
    """Parameters of a backbone, and of each way to have a family on it."""
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(AutoConfig.for_model(**layout))
        found = {"backbone": backbone.num_parameters()}
        model = add_streams(backbone, {"nested": [2, 4, 8], "p2": [2], "p4": [4], "p8": [8]})
    of = {
        name: sum(x.parameter.numel() for x in adapter_parameters(model, name))
        for name in model.peft_config
    }
    separate = of["p2"] + of["p4"] + of["p8"]
    return found | {"nested": of["nested"], "separate": separate, "only": of["p4"]}


def main() -> None:
    """Print the record, and write it where `--out` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file for the record")
    options = parser.parse_args()
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "parameters": {name: count(layout) for name, layout in LAYOUTS.items()},
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
