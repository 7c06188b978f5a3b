"""The model card: metadata that the Hub accepts, and how to load the adapters."""

import re
from typing import Any

from huggingface_hub import ModelCardData

from recycle.results import ADAPTED, CONTROL, Results, precision, rows_of_training

from .evaluations import evaluation_results
from .markdown import bullets, code, escape, facts, fence, join_blocks
from .publication import hide_folders
from .result import render_result

RECYCLE = """\
import recycle
from transformers import AutoTokenizer

model = recycle.load("FOLDER", p={largest})
inputs = AutoTokenizer.from_pretrained("FOLDER")("def fibonacci(n):", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64)
recycle.set_p(model, {smallest})  # any of {offered}{one}"""
PEFT = """\
import recycle.parscale  # registers the method with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER/p{largest}")"""
PEFT_ON_LORA = """\
import recycle.parscale  # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(backbone, "FOLDER/adapted").{merge}()
model = PeftModel.from_pretrained(model, "FOLDER/p{largest}")"""
PEFT_ON_MODEL = """\
import recycle.parscale  # registers the method with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

backbone = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(backbone, "FOLDER/p{largest}")"""
ONE = {
    "none": "; 1 is the backbone, bit for bit",
    "lora": "; 1 is the adapted model",
    "full": "; 1 is the adapted model",
    "all": "",
}
FOUNDATIONS = {
    "none": "The backbone is frozen and not part of this folder.",
    "lora": "They stand on the backbone with the LoRA in `adapted/` merged into it, which is P = 1 "
    "and of use on its own. The backbone is not part of this folder.",
    "full": "They stand on the model in `adapted/`: the backbone after training on the same text, "
    "which is P = 1 and of use on its own.",
    "all": "All weights were trained together with the streams and lie in `backbone/`; there is no "
    "P = 1.",
}
ELSEWHERE = (
    "The backbone is not on the Hub. On another machine, say where it is: "
    '`recycle.load("FOLDER", backbone="BACKBONE")`.'
)


def render_card(results: Results, name: str | None = None) -> str:
    """The README.md of the run folder, meant to be published.

    Args:
        results: Of the run.
        name: Its id on the Hub, if that is known.
    """
    results = hide_folders(results)
    backbone, data = results.backbone, results.data
    streams = sorted(model.num_streams for model in results.models if model.num_streams > 1)
    largest, smallest = streams[-1], streams[0]
    trained_on = results.first or backbone
    kind = _foundation(results)
    offered = streams if kind == "all" else [1, *streams]
    # A model in the folder has no place that holds after a move; published, no folder has one.
    base = {"full": "FOLDER/adapted", "all": "FOLDER/backbone"}.get(kind, "BACKBONE")
    elsewhere = base != "BACKBONE" or (name is not None and backbone.source != "hub")
    plain = PEFT_ON_LORA if kind == "lora" else PEFT_ON_MODEL if elsewhere else PEFT
    merge = "get_base_model" if trained_on.quantization else "merge_and_unload"
    rows = [x.name for x in results.models]
    tokens = [
        f"{', '.join(name for name in rows_of_training(x) if name in rows)}: {x.tokens:,}"
        for x in results.training
    ]
    return join_blocks(
        f"---\n{_metadata(results)}\n---",
        f"# {escape(results.name)}",
        f"Adapters that give {code(backbone.id)} P = {', '.join(map(str, streams))} parallel "
        f"streams ([ParScale](https://arxiv.org/abs/2505.10475)). {FOUNDATIONS[kind]}",
        bullets(_adapters(results, kind)),
        "## How to load",
        f"With `recycle-lm` installed{'' if name else '; FOLDER is this folder or its Hub id'}:",
        fence(
            RECYCLE.format(
                largest=largest, smallest=smallest, offered=offered, one=ONE[kind]
            ).replace("FOLDER", name or "FOLDER"),
            "python",
        ),
        "One P with plain PEFT, where FOLDER is on disk:",
        fence(plain.format(largest=largest, merge=merge, base=base), "python"),
        ""
        if backbone.source == "hub" or kind in ("full", "all")
        else ELSEWHERE.replace("FOLDER", name or "FOLDER"),
        "`recycle.load` loads the backbone as it was in training "
        f"({escape(precision(trained_on))}), or as its `dtype=` and `quantization_config=` say; "
        "`recycle eval` measures what that changes.",
        render_result(results),
        "## Training",
        facts(
            {
                "backbone": backbone.id,
                "backbone revision": backbone.revision,
                "backbone fingerprint": backbone.fingerprint,
                "backbone dtype": trained_on.dtype,
                "backbone quantisation": trained_on.quantization,
                "backbone licence": backbone.license or "unknown",
                "data": data.source if data.path is None else f"{data.source}: {data.path}",
                "data licence": data.license or "unknown",
                "text tokens learned from": "; ".join(tokens),
            }
        ),
        "More in `report.md`; every number, with the loss of each document, in `results.json`.",
    )


def _adapters(results: Results, kind: str) -> list[str]:
    """Each adapter with its P and parameters, in Markdown."""
    whole = results.backbone.parameters if kind == "all" else 0  # counted with the streams
    lines = []
    for row in results.models:
        parameters = f"{row.adapter_parameters - whole:,} parameters"
        if row.num_streams > 1:
            lines.append(f"`p{row.num_streams}/`: P = {row.num_streams}, {parameters}")
        elif row.name == CONTROL:
            lines.append(f"`control/`: one stream, for comparison, {parameters}")
        elif row.name == ADAPTED:
            what = "a LoRA of" if kind == "lora" else "the whole model,"
            lines.append(f"`adapted/`: P = 1, {what} {parameters}")
    return lines


def _foundation(results: Results) -> str:
    """What the streams stand on, as the recipe says: "none", "lora", "full" or "all"."""
    stages: Any = results.recipe.get("stages", {})
    if stages.get("streams", {}).get("train") == "all":
        return "all"
    if not any(model.name == ADAPTED for model in results.models):
        return "none"
    return "full" if stages["adapt"]["train"] == "full" else "lora"


def _metadata(results: Results) -> str:
    """The card's metadata in YAML; Hub ids only where the Hub knows them."""
    backbone, data = results.backbone, results.data
    on_hub = backbone.source == "hub"
    relation = "finetune" if _foundation(results) in ("full", "all") else "adapter"
    licence, licence_name = _licence(backbone.license)
    card = ModelCardData(
        base_model=backbone.id if on_hub else None,
        base_model_relation=relation if on_hub else None,
        license=licence,
        license_name=licence_name,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["parscale", "recycle"],
        datasets=[data.path] if data.source == "hub" and data.path is not None else None,
        model_name=results.name,
        eval_results=evaluation_results(results),
    )
    return card.to_yaml(line_break="\n").strip()


def _licence(named: str | None) -> tuple[str | None, str | None]:
    """A licence as the Hub wants it: its identifier, or `other` and a name."""
    if named is None:
        return None, None
    identifier = named.lower()
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", identifier):
        return identifier, None
    return "other", re.sub(r"[^a-z0-9.]+", "-", identifier).strip("-") or "unnamed"
