"""Tiny runs: a recipe of seconds over a tiny model and generated text files, and the command.

recipe = write_recipe(tmp_path, model_folder, **{"training.tokens": 512})
done = recycle("run", recipe, cwd=tmp_path)
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recycle import cli
from recycle.recipe.fields import nest

ROOT = Path(__file__).parents[1]
WORDS = ("merge", "left", "result", "sorted", "reader", "quick", "fox", "lazy", "streams", "names")

STEP_TOKENS = 4 * 32  # blocks of an optimiser step times tokens of a block
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "backbone.dtype": "float32",
    "stages.adapt.train": "none",
    "streams": [2, 4],
    "method.num_virtual_tokens": 4,
    "data.source": "files",
    "data.block_size": 32,
    "data.validation_documents": 3,
    "data.test_documents": 6,
    "training.tokens": 8 * STEP_TOKENS,
    "training.batch_size": 4,
    "training.micro_batch_size": 2,
    "stages.streams.prefix_learning_rate": 1e-2,
    "stages.streams.aggregator_learning_rate": 1e-3,
    "stages.streams.control_learning_rate": 1e-2,
    "training.checkpoint_steps": 2,
    "training.validation_steps": 4,
    "evaluation.speed": False,
    "evaluation.samples": 0,
    "launch.device": "cpu",
}


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of some 200 tokens each that share no line."""
    rng = random.Random(seed)
    return [
        "\n".join(f"{number} " + " ".join(rng.choices(WORDS, k=8)) for _ in range(10))
        for number in range(count)
    ]


def write_texts(folder: Path, count: int = 48) -> Path:
    """Text files in a new folder; each is a group of its own."""
    folder.mkdir(parents=True)
    for number, text in enumerate(texts(count)):
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def settings(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """A whole tiny recipe as dotted keys; keys with the value None are left out."""
    values = SETTINGS | {"backbone.id": str(model), "data.path": str(data)} | changes
    return {key: value for key, value in values.items() if value is not None}


def write_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """Write `tiny.yaml` into a folder, with text files beside it (made where missing)."""
    data = folder / "texts"
    if not data.exists():
        write_texts(data)
    values = settings(model, data, **changes)
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(nest(values)))  # JSON is YAML
    return path


def environment(**changes: str) -> dict[str, str]:
    """The environment of a `recycle` command in a test: this checkout, no network, and one thread.

    Losses are compared to 1e-6 with this process, which has one thread too.
    """
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
        **changes,
    }


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "recycle", *map(str, arguments)]


def recycle(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `python -m recycle` to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


def command_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command in this process, where libraries are imported already."""

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["recycle", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, status, printed.out, printed.err)

    return command


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command ended with status 2 and one message on standard error that has these words."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("recycle: "), done.stderr
    assert done.stderr.count("recycle: ") == 1
    for word in words:
        assert word in done.stderr


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
