"""The comparison: test losses, speed and sizes of the backbone, the control and each P."""

import math
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from peft import PeftModelForCausalLM
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from recycle import data, family, results
from recycle.backbone import load_backbone
from recycle.backbone.fingerprint import Fingerprint, differences
from recycle.evaluate import losses as evaluate
from recycle.parscale.initialise import streams_of
from recycle.progress import Display, Silent
from recycle.recipe import Recipe, identity, resolve
from recycle.results import FirstMeasurement, Results, precision
from recycle.train import steps

from .folder import RECIPE, RESULTS, RunError
from .record import backbone_record, device_of, hardware, scored_documents, with_dtype

PRECISION = ("backbone.dtype", "backbone.quantization")  # which `recycle eval` may change


def prepare_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> data.Splits:
    """The splits of a recipe: blocks for its token budget, and start texts where it wants them."""
    return data.prepare(
        recipe.data,
        tokenizer,
        train_blocks=steps(recipe) * recipe.training.batch_size,
        num_virtual_tokens=recipe.method.num_virtual_tokens,
        num_starts=max(recipe.streams) if recipe.method.init == "text" else 0,
    )


def check_window(recipe: Recipe, config: PretrainedConfig) -> None:
    """Refuse blocks and prompts that are longer than the backbone's window.

    Raises:
        RunError: A model with learned positions has none for them, and others were never trained
            on them.
    """
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = {"data.block_size": recipe.data.block_size}
    if recipe.evaluation.speed:
        length = recipe.evaluation.prompt_tokens + recipe.evaluation.new_tokens
        lengths["evaluation.prompt_tokens + evaluation.new_tokens"] = length
    too_long = [f"{k} = {length}" for k, length in lengths.items() if window and length > window]
    if too_long:
        raise RunError(
            f"The window of {recipe.backbone.id} is {window} tokens (max_position_embeddings), and "
            f"{', '.join(too_long)}. Set {'it' if len(too_long) == 1 else 'them'} to at most that."
        )


def check_tokens(splits: data.Splits, model: PreTrainedModel) -> None:
    """Refuse data with token ids that the model has no embedding for.

    Raises:
        RunError: The tokenizer belongs to another model.
    """
    size = model.get_input_embeddings().num_embeddings
    rows = [document.input_ids for document in (*splits.validation, *splits.test)]
    rows += splits.starts.tolist()
    blocks = splits.train.with_format("numpy")[:]["input_ids"]
    largest = max(max(map(max, rows)), int(np.max(blocks, initial=0)))
    if largest >= size:
        raise RunError(
            f"The tokenizer gives token {largest}, and the backbone has embeddings for 0 to "
            f"{size - 1} only. Put the tokenizer of the model beside its weights."
        )


def measure(
    model: PeftModelForCausalLM,
    splits: data.Splits,
    recipe: Recipe,
    trainings: list[results.TrainingRecord],
    progress: Silent,
) -> list[results.Measurement]:
    """Test losses, speed and sizes of the backbone, the control and each P, as in the table."""
    layer = streams_of(model)
    models = evaluate.contenders(layer)
    together = evaluate.passes(models)
    length = recipe.data.block_size * len(splits.test)
    progress.start("test loss", length * sum(group[-1].num_streams for group in together))
    losses = evaluate.document_losses(
        model, layer, models, splits.test, recipe.evaluation.batch_size, progress.advance
    )
    if broken := [name for name, each in losses.items() if not all(map(math.isfinite, each))]:
        raise RunError(
            f"The test loss of {', '.join(broken)} is not finite, with the backbone in "
            f"{str(model.dtype).removeprefix('torch.')}. {evaluate.range_advice(model)}".rstrip()
        )
    speeds: dict[str, results.Speed] = {}
    if recipe.evaluation.speed:
        progress.start("speed", len(models) * (evaluate.REPEATS + 1))
        speeds = evaluate.speeds(
            model,
            layer,
            models,
            recipe.evaluation.prompt_tokens,
            recipe.evaluation.new_tokens,
            progress.advance,
        )
    training_speed = {training.name: training.tokens_per_second for training in trainings}
    kv_bytes = evaluate.kv_bytes_per_token(model, layer, models)
    measurements = []
    for contender in models:
        name, streams = contender.name, contender.streams
        trained_at = training_speed.get(streams.adapter) if streams else None
        speed = speeds.get(name, results.Speed()).model_copy(
            update={"train_tokens_per_second": trained_at}
        )
        state = family.member_state(model, streams.adapter, streams.num_streams) if streams else {}
        measurements.append(
            results.Measurement(
                name=name,
                num_streams=contender.num_streams,
                losses=tuple(losses[name]),
                adapter_parameters=sum(tensor.numel() for tensor in state.values()),
                kv_bytes_per_token=kv_bytes[name],
                speed=speed,
            )
        )
    return measurements


def evaluate_again(
    run_folder: str, overrides: list[str], out: str | None, command: str, console: Console
) -> Results:
    """Measure a finished run's adapters again, on this machine and the same documents.

    The record holds the run's own losses as well, and the difference to them is shown.

    Args:
        run_folder: The finished run.
        overrides: `key=value` of the sections evaluation and launch, and of the backbone's
            precision. The data stay as they were: in another split, documents that were trained
            on could be measured.
        out: Where to write the new results; None keeps them off the disk.

    Raises:
        RunError: The folder is no finished run, or an override would need other adapters.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise RunError(f"There is no folder {folder}. Name the folder of a finished run.")
    if not (folder / RESULTS).is_file():
        raise RunError(
            f"{folder} is no finished run: it has no {RESULTS}. Finish it with `recycle run`."
        )
    if out is not None and Path(out).exists():
        raise RunError(f"{out} exists already and is not overwritten. Name a new file.")
    if out is not None and not Path(out).parent.is_dir():
        raise RunError(f"{out} cannot be written: there is no folder {Path(out).parent}.")
    before = results.read(folder / RESULTS)
    first = FirstMeasurement(
        date=before.date,
        dtype=before.backbone.dtype,
        quantization=before.backbone.quantization,
        losses={model.name: model.losses for model in before.models},
    )
    keys = [override.partition("=")[0].strip() for override in overrides]
    fixed = [
        key
        for key in keys
        if key.partition(".")[0] not in ("evaluation", "launch") and key not in PRECISION
    ]
    if fixed:
        raise RunError(
            "`recycle eval` measures the same adapters on the same documents and takes fields of "
            f"evaluation and launch, {' and '.join(PRECISION)} only, got {', '.join(fixed)}."
        )
    recipe = resolve(str(folder / RECIPE), overrides).recipe
    device = device_of(recipe)
    machine = hardware(device)
    recipe = recipe.model_copy(update={"backbone": with_dtype(recipe.backbone, device)})
    backbone, tokenizer, source = load_backbone(recipe.backbone, device)
    check_window(recipe, backbone.config)
    members = family.read_members(folder, family.Family.read(folder))
    trained_on = Fingerprint.from_dict(members[0].config.fingerprint or {})
    if differing := differences(trained_on, source.fingerprint):
        raise RunError(
            f"{folder} was trained on another backbone than lies at {recipe.backbone.id} now: "
            f"{'; '.join(differing)}."
        )
    model = family.attach(backbone, members, folder)
    splits = prepare_data(recipe, tokenizer)
    if splits.facts["sha256"] != before.data.facts["sha256"]:
        raise RunError(
            f"The data at {recipe.data.path or recipe.data.source} are not those of the run any "
            "more (their SHA-256 differs), so its test documents cannot be measured again."
        )
    with Display(console) as display:
        started = time.perf_counter()
        measured = backbone_record(recipe, backbone, source)
        # Elsewhere, and in another precision, the training's speed says nothing.
        comparable = machine == before.hardware and precision(measured) == precision(first)
        trainings = list(before.training) if comparable else []
        measurements = measure(model, splits, recipe, trainings, display)
    record = Results.model_validate(
        dict(before)
        | {
            "date": datetime.now(UTC),
            "command": command,
            "recipe": recipe.model_dump(mode="json"),
            "recipe_identity": identity(recipe),
            "packages": results.packages(),
            "hardware": machine,
            "backbone": measured,
            "models": results.compare(scored_documents(splits.test), measurements),
            "wall_seconds": before.wall_seconds.model_copy(
                update={"evaluation": time.perf_counter() - started}
            ),
            "first": first,
        }
    )
    if out is not None:
        results.write(record, Path(out))
    console.print(results.rich_table(record))
    console.print(results.rich_first_table(record))
    return record
