"""What of a run folder leaves this machine.

Adapters and weights as they are, the tokenizer in JSON with its chat template in it, and what is
made anew from the results, without paths: card, report, plots, and `results.json` with the recipe.
Nothing else: checkpoints, optimiser states and the weights that were only compared stay.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from recycle import results
from recycle.disk import expand, file_sha256, read_json_object
from recycle.errors import RecycleError
from recycle.family.record import ADAPTED, CONFIG, CONTROL, FAMILY_FILE, Family
from recycle.report import render_card, write_report
from recycle.report.publication import cut_places, hide_folders
from recycle.results import Results

RESULTS = "results.json"
BACKBONE = "backbone"
TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What a folder of a family, or of a whole model, is known to hold.
KNOWN = re.compile(
    r"tokenizer(_config)?\.json|(special_tokens_map|added_tokens)\.json"
    r"|adapter_(config\.json|model\.safetensors)|(generation_)?config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
PUBLIC = ("hub", "stdlib", "tasks")  # sources whose text is no secret
SYSTEM = "bin|boot|dev|etc|lib|lib64|proc|sbin|sys|usr"  # folders that are on every machine
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}")

Content = bytes | Path


class PublicationError(RecycleError):
    """A run cannot be published."""


def contents(run: Path, name: str) -> dict[str, Content]:
    """The files to publish, by their path in the repository.

    Args:
        run: The folder of a finished run.
        name: Of the repository, for the card.

    Raises:
        PublicationError: The run is not finished, a link leads out of its folder, or a file names a
            folder of this machine.
    """
    if not run.is_dir():
        raise PublicationError(f"There is no folder {run}. Name the folder of a finished run.")
    if not (run / RESULTS).is_file() or not (run / FAMILY_FILE).is_file():
        raise PublicationError(
            f"{run} is no finished run, it lacks {RESULTS} or {FAMILY_FILE}. Finish it with "
            "`recycle run`."
        )
    family, record = Family.read(run), without_text(hide_folders(results.read(run / RESULTS)))
    record = record.model_copy(update={"command": cut_places(record.command, record)})
    folders = [f"p{p}" for p in family.p_values] + [CONTROL] * family.control
    folders += [x for x in (ADAPTED, BACKBONE) if (run / x).is_dir()]
    found: dict[str, Content] = {FAMILY_FILE: run / FAMILY_FILE}
    for place in (run, *(run / folder for folder in folders)):
        for path in sorted(x for x in place.iterdir() if KNOWN.fullmatch(x.name) and x.is_file()):
            found[path.relative_to(run).as_posix()] = path
            _inside(path, run)
    for file in (TOKENIZER, *family.sha256):
        whole = file in found and family.sha256.get(file) in (None, file_sha256(run / file))
        if not whole:
            raise PublicationError(
                f"{run / file} is missing or was changed. Copy the whole run folder again."
            )
    for file in list(found):
        if file.endswith(CONFIG):
            found[file] = _without_place(run / file, record)
        if Path(file).name == TOKENIZER_CONFIG:
            found[file] = _with_template(run / file, run)
    found |= _made_anew(record, name)
    _refuse_places(found, run)
    return found


def without_text(record: Results) -> Results:
    """The record without prompts, and without names of documents, of text that is not public."""
    if record.data.source in PUBLIC:
        return record
    documents = [
        x.model_copy(update={"name": f"document {number}", "group": ""})
        for number, x in enumerate(record.documents, start=1)
    ]
    parts = {"data": record.data, "adapt_data": record.adapt_data}
    return record.model_copy(
        update={"samples": (), "documents": tuple(documents)}
        | {
            name: part.model_copy(
                update={"facts": {k: x for k, x in part.facts.items() if k != "start_texts"}}
            )
            for name, part in parts.items()
            if part is not None
        }
    )


def _inside(path: Path, run: Path) -> None:
    if not path.resolve().is_relative_to(run.resolve()):
        raise PublicationError(f"{path} is a link out of the run's folder. Copy the file.")


def _without_place(path: Path, record: Results) -> bytes:
    """An adapter's config, in which a backbone on this machine has no place."""
    config = read_json_object(path, PublicationError)
    recorded = str(config.get("base_model_name_or_path") or "")
    on_hub = record.backbone.source == "hub" and recorded == record.backbone.id
    if not on_hub and (recorded.startswith(("/", "~", ".")) or expand(recorded).exists()):
        own = Path(recorded).name  # where it is one of the family's folders, it is found there
        config["base_model_name_or_path"] = own if own in (ADAPTED, BACKBONE) else None
    return f"{json.dumps(config, indent=2)}\n".encode()


def _with_template(path: Path, run: Path) -> bytes:
    """A tokenizer's config with the chat template, which transformers reads from there as well."""
    config, template = read_json_object(path, PublicationError), path.parent / TEMPLATE
    if template.is_file():
        _inside(template, run)
        config["chat_template"] = template.read_text("utf-8", errors="replace")
    return f"{json.dumps(config, indent=2, ensure_ascii=False)}\n".encode()


def _made_anew(record: Results, name: str) -> dict[str, Content]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_report(record, folder)
        results.write(record, folder / RESULTS)
        made: dict[str, Content] = {x.name: x.read_bytes() for x in sorted(folder.iterdir())}
    return made | {"README.md": render_card(record, name).encode()}


def _refuse_places(found: Mapping[str, Content], run: Path) -> None:
    """Refuse a text, or a header of weights, that names a folder of this machine or a token."""
    places = {str(x) for x in (Path.home(), Path.cwd(), run.absolute(), run.resolve())} - {"/"}
    named = re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, sorted(places)))})(?![\w-])")
    elsewhere = re.compile(rf"(?<![\w.-])/+(?!(?:{SYSTEM})/)[\w.-]+(?:/[\w.-]+)+")
    for file, text in _texts(found):
        # A reply of a model may name /tmp/x; what counts is a place that is there.
        there = [x[0] for x in elsewhere.finditer(text) if _is_here(Path(x[0]))]
        there += [x[0] for x in (named.search(text), SECRET.search(text)) if x]
        if there:
            raise PublicationError(
                f"{file} names {there[0]}, of this machine or a secret, and nothing was uploaded. "
                "Take that out of the run folder's file, or run the recipe with a relative path."
            )


def _is_here(path: Path) -> bool:
    """Whether a path, or a folder on the way that is below one of the root's, is on this disk."""
    return any(x.exists() for x in (path, *path.parents) if len(x.parts) > 2)


def _texts(found: Mapping[str, Content]) -> Iterator[tuple[str, str]]:
    for file, content in found.items():
        if isinstance(content, bytes):
            if not file.endswith(".png"):
                yield file, content.decode(errors="replace")
        elif content.suffix == ".safetensors":
            with content.open("rb") as weights:
                size = int.from_bytes(weights.read(8), "little")
                if size > content.stat().st_size:
                    raise PublicationError(f"{content} is damaged. Copy it again.")
                yield file, weights.read(size).decode(errors="replace")
        elif content.name != TOKENIZER:  # any text can be a token
            yield file, content.read_text("utf-8", errors="replace")
