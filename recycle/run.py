"""The main job: recipe -> backbone -> streams -> train -> compare -> report."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from peft import PeftModelForCausalLM
from rich.console import Console

from . import backbone as backbones
from . import data, evaluate, report, results
from .parscale import family
from .parscale.fingerprint import Fingerprint, differences
from .progress import Display, Silent, minutes
from .recipe import Backbone, Recipe, RecipeError, Resolved, differing_keys, dump, identity, resolve
from .recipe import load as load_recipe
from .results import Results
from .train import add_adapter, estimate, jobs, steps, train, writing

RECIPE = "recipe.yaml"
RESULTS = "results.json"
CHECKPOINTS = "checkpoints"


class RunError(ValueError):
    """The run folder cannot be used for this recipe."""


def run(resolved: Resolved, command: str, console: Console) -> Results:
    """Recycle a backbone as a recipe says, and leave a run folder behind.

    A folder with the same recipe goes on where it stopped, or gives its results again if it is
    finished.

    Args:
        resolved: The recipe.
        command: The command line, for the record.
        console: Where progress and the table go.

    Raises:
        RunError: The folder belongs to another recipe, or another process is writing it.
        BackboneError, DataError, TrainingError: See there; the folder can be resumed after mending.
    """
    recipe = resolved.recipe
    folder = run_folder(recipe)
    finished = previous_results(recipe, folder)
    if finished is not None:
        console.print(f"{folder} is finished; its results:")
        console.print(results.rich_table(finished))
        return finished

    device = _device(recipe)
    started = time.perf_counter()
    console.print(f"Backbone: {recipe.backbone.id}")
    model, tokenizer, source = backbones.load(_with_dtype(recipe.backbone, device), device)
    console.print(f"Data: {recipe.data.source} {recipe.data.path or ''}".rstrip())
    splits = data.prepare(
        recipe.data,
        tokenizer,
        train_blocks=steps(recipe) * recipe.training.batch_size,
        num_virtual_tokens=recipe.method.num_virtual_tokens,
        num_starts=max(recipe.streams),
    )
    setup = time.perf_counter() - started

    with _claimed(folder, recipe):
        peft_model: Any = model
        trainings = []
        with Display(console) as display:
            for position, job in enumerate(jobs(recipe)):
                peft_model = add_adapter(peft_model, job, recipe, splits.starts)
                if position == 0:
                    expected = estimate(peft_model, recipe)
                    console.print(
                        f"Expected: {minutes(expected.seconds)} and {expected.gib:.1f} GiB of "
                        f"{'GPU ' if device == 'cuda' else ''}memory, for training on "
                        f"{recipe.training.tokens:,} tokens and the comparison"
                    )
                checkpoints = folder / CHECKPOINTS / job.adapter
                trainings.append(
                    train(peft_model, tokenizer, job, splits, recipe, checkpoints, display)
                )
            with writing(folder):
                family.save_family(peft_model, folder, source.fingerprint)
                tokenizer.save_pretrained(folder)

            started = time.perf_counter()
            measurements = measure(peft_model, splits, recipe, trainings, display)
            evaluation = time.perf_counter() - started

        record = Results(
            name=recipe.name,
            date=datetime.now(UTC),
            command=command,
            recipe=recipe.model_dump(mode="json"),
            recipe_identity=identity(recipe),
            packages=results.packages(),
            hardware=_hardware(device),
            seeds={"data": recipe.data.seed, "training": recipe.training.seed},
            backbone=_backbone_record(recipe, model, source),
            data=_data_record(recipe, splits),
            training=tuple(trainings),
            documents=_scored(splits.test),
            models=results.compare(_scored(splits.test), measurements),
            wall_seconds=results.WallSeconds(
                setup=setup,
                training=sum(training.wall_seconds for training in trainings),
                evaluation=evaluation,
            ),
        )
        report.write_report(record, folder)
        results.write(record, folder / RESULTS)
        shutil.rmtree(folder / CHECKPOINTS)
    console.print(results.rich_table(record))
    console.print(f"Report: {folder / 'report.md'}")
    return record


def measure(
    model: PeftModelForCausalLM,
    splits: data.Splits,
    recipe: Recipe,
    trainings: list[results.Training],
    progress: Silent,
) -> list[results.Measurement]:
    """Test losses, speed and sizes of the backbone, the control and each P, in the order of the
    table.
    """
    layer = evaluate.streams_of(model)
    models = evaluate.contenders(layer)
    together = evaluate.passes(models)
    length = recipe.data.block_size * len(splits.test)
    progress.start("test loss", length * sum(group[-1].num_streams for group in together))
    losses = evaluate.document_losses(
        model, layer, models, splits.test, recipe.evaluation.batch_size, progress.advance
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
        speed = speeds.get(name)
        if speed is not None and streams is not None:
            trained_at = training_speed.get(streams.adapter)
            speed = speed.model_copy(update={"train_tokens_per_second": trained_at})
        state = family.member_state(model, streams.adapter, streams.num_streams) if streams else {}
        measurements.append(
            results.Measurement(
                name=name,
                streams=contender.num_streams,
                losses=tuple(losses[name]),
                adapter_parameters=sum(tensor.numel() for tensor in state.values()),
                kv_bytes_per_token=kv_bytes[name],
                speed=speed,
            )
        )
    return measurements


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run lies."""
    return Path(recipe.output.dir or Path("runs") / recipe.name)


def previous_results(recipe: Recipe, folder: Path) -> Results | None:
    """The results of a finished run of the same recipe; None if the run is new or unfinished.

    Raises:
        RunError: The folder holds something else.
    """
    if not folder.exists():
        return None
    saved = folder / RECIPE
    if not folder.is_dir() or (not saved.is_file() and any(folder.iterdir())):
        raise RunError(
            f"{folder} exists and is no run folder (it has no {RECIPE}); nothing was changed. "
            "Choose another with output.dir=FOLDER."
        )
    if not saved.is_file():
        return None
    try:
        differing = differing_keys(load_recipe(saved), recipe)
    except RecipeError as error:
        raise RunError(f"{saved} cannot be read, so the run cannot be resumed: {error}") from None
    if differing:
        raise RunError(
            f"{folder} holds a run of another recipe, which differs in {', '.join(differing)}; "
            f"nothing was changed. "
            "Set these as they were to go on with that run, or choose another folder with "
            "output.dir=FOLDER."
        )
    return results.read(folder / RESULTS) if (folder / RESULTS).is_file() else None


@contextmanager
def _claimed(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Hold the run folder against other processes; write the recipe that makes it a run folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"Cannot make the folder {folder}: {error.strerror}. Choose another with "
            "output.dir=FOLDER."
        ) from None
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"Another process is running in {folder}. Wait for it, or choose another folder "
            f"with output.dir=FOLDER."
        ) from None
    try:
        results.write_atomically(folder / RECIPE, dump(recipe).encode())
        yield
    finally:
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)


def _device(recipe: Recipe) -> str:
    if recipe.launch.device == "cuda" and not torch.cuda.is_available():
        raise RunError("launch.device=cuda, but torch sees no CUDA device. Use launch.device=auto.")
    if recipe.launch.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return recipe.launch.device


def _with_dtype(backbone: Backbone, device: str) -> Backbone:
    """Settle dtype `auto`: bfloat16 is several times slower than float32 on a CPU that emulates
    it.
    """
    if backbone.dtype != "auto":
        return backbone
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return backbone.model_copy(update={"dtype": "bfloat16" if native else "float32"})


def _hardware(device: str) -> results.Hardware:
    if device == "cpu":
        return results.hardware()
    properties = torch.cuda.get_device_properties(0)
    return results.hardware(properties.name, properties.total_memory / 2**30)


def _backbone_record(
    recipe: Recipe, model: Any, source: backbones.Source
) -> results.BackboneRecord:
    on_hub = source.revision is not None
    identifying = {key: value for key, value in source.fingerprint.to_dict().items() if key != "id"}
    packaged = recipe.backbone.id.startswith("package://")
    return results.BackboneRecord(
        id=recipe.backbone.id,
        source="package" if packaged else "hub" if on_hub else "folder",
        revision=source.revision,
        fingerprint=hashlib.sha256(json.dumps(identifying, sort_keys=True).encode()).hexdigest(),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=recipe.backbone.quantization,
        parameters=model.num_parameters() - _adapter_parameters(model),
        model_type=model.config.model_type,
        vocab_size=model.config.get_text_config().vocab_size,
        license=_hub_licence(source.id, dataset=False) if on_hub else source.notes.get("license"),
    )


def _data_record(recipe: Recipe, splits: data.Splits) -> results.DataRecord:
    path = recipe.data.path
    on_hub = recipe.data.source == "hub"
    return results.DataRecord(
        source=recipe.data.source,
        path=path,
        license=_hub_licence(path or "", dataset=True) if on_hub else None,
        facts=splits.facts,
    )


def _adapter_parameters(model: Any) -> int:
    return sum(tensor.numel() for name, tensor in model.named_parameters() if "parscale_" in name)


def _hub_licence(repository: str, dataset: bool) -> str | None:
    """The licence that a repository's card on the Hub names; None where it is out of reach."""
    api = HfApi()
    try:
        info = api.dataset_info(repository) if dataset else api.model_info(repository)
    except (HTTPError, OSError):
        return None
    return info.card_data.get("license") if info.card_data else None


def _scored(documents: list[data.Document]) -> tuple[results.ScoredDocument, ...]:
    return tuple(
        results.ScoredDocument(
            name=document.name,
            group=document.group,
            tokens=len(document.input_ids) - 1,
            bytes=document.num_bytes,
        )
        for document in documents
    )


def evaluate_again(
    run_folder: str, overrides: list[str], out: str | None, command: str, console: Console
) -> Results:
    """Measure a finished run again on this machine, with changes to its recipe's data or
    evaluation.

    Args:
        run_folder: The finished run.
        overrides: `key=value` of the sections data, evaluation and launch.
        out: Where to write the new results; None keeps them off the disk.

    Raises:
        RunError: The folder is no finished run, or an override would need other adapters.
    """
    folder = Path(run_folder)
    if not (folder / RESULTS).is_file():
        raise RunError(
            f"{folder} is no finished run: it has no {RESULTS}. Finish it with `recycle run`."
        )
    if out is not None and Path(out).exists():
        raise RunError(f"{out} exists already and is not overwritten. Name a new file.")
    if out is not None and not Path(out).parent.is_dir():
        raise RunError(f"{out} cannot be written: there is no folder {Path(out).parent}.")
    before = results.read(folder / RESULTS)
    recipe = resolve(str(folder / RECIPE), overrides).recipe
    fixed = [
        key
        for key in differing_keys(load_recipe(folder / RECIPE), recipe)
        if key.partition(".")[0] not in ("data", "evaluation")
    ]
    if fixed:
        raise RunError(
            f"`recycle eval` measures the adapters as they are and takes changes to data and "
            f"evaluation; "
            f"{', '.join(fixed)} belongs to training."
        )
    device = _device(recipe)
    backbone, tokenizer, source = backbones.load(_with_dtype(recipe.backbone, device), device)
    members = family.read_members(folder, family.Family.read(folder))
    trained_on = Fingerprint.from_dict(members[0].config.fingerprint or {})
    if differing := differences(trained_on, source.fingerprint):
        raise RunError(
            f"{folder} was trained on another backbone than lies at {recipe.backbone.id} now: "
            f"{'; '.join(differing)}."
        )
    model = family.attach(backbone, members, folder)
    splits = data.prepare(
        recipe.data,
        tokenizer,
        train_blocks=steps(recipe) * recipe.training.batch_size,
        num_virtual_tokens=recipe.method.num_virtual_tokens,
        num_starts=max(recipe.streams),
    )
    with Display(console) as display:
        started = time.perf_counter()
        measurements = measure(model, splits, recipe, list(before.training), display)
    record = before.model_copy(
        update={
            "date": datetime.now(UTC),
            "command": command,
            "recipe": recipe.model_dump(mode="json"),
            "recipe_identity": identity(recipe),
            "packages": results.packages(),
            "hardware": _hardware(device),
            "data": _data_record(recipe, splits),
            "documents": _scored(splits.test),
            "models": results.compare(_scored(splits.test), measurements),
            "wall_seconds": before.wall_seconds.model_copy(
                update={"evaluation": time.perf_counter() - started}
            ),
        }
    )
    if out is not None:
        results.write(record, Path(out))
    console.print(results.rich_table(record))
    return record
