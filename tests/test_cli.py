"""The `recycle` command: what it prints, and what its user can put right in one message."""

import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

from recycle import __version__, results
from recycle.cli.app import app
from recycle.family.record import FAMILY_FILE
from tests.runs import assert_refused, command_here, contents, environment, write_recipe
from tests.runs import recycle as run_command

GOLDEN = Path(__file__).parent / "golden" / "qwen2-p2"


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
Recycle = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def recycle(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Recycle:
    return command_here(capsys, monkeypatch)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with `tiny.yaml` and its finished run `runs/tiny`, made by the command."""
    folder = tmp_path_factory.mktemp("home")
    write_recipe(folder, tiny_folder)
    done = run_command("run", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars and warnings of libraries
    (folder / "run.out").write_text(done.stdout)
    return folder


@pytest.fixture(autouse=True)
def _in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


# ---- what it prints


def test_run(home: Path) -> None:
    printed = (home / "run.out").read_text()
    record = results.read(home / "runs/tiny/results.json")
    assert "Recipe: recipe file tiny.yaml" in printed
    tokens = "for training nested on 1,024 tokens, control on 1,024 tokens, and the comparison"
    assert tokens in printed
    assert printed.index("Expected: ") < printed.index("nested: 0 tokens, validation loss P = 2")
    assert "control: 1,024 tokens, validation loss control" in printed
    rows = printed[printed.index("± se") :].splitlines()
    for model in record.models:
        (row,) = (row for row in rows if row.startswith(f"{model.name} "))
        assert f"{model.loss:.4f}" in row
        assert f"{model.kv_bytes_per_token:,}" in row
    assert "Report: runs/tiny/report.html" in printed
    assert record.command == "recycle run tiny.yaml"


def test_run_again(recycle: Recycle, home: Path) -> None:
    before = contents(home / "runs")
    done = recycle("run", "tiny.yaml")
    assert done.returncode == 0
    assert "runs/tiny is finished; its results (--new starts another run):" in done.stdout
    assert contents(home / "runs") == before


def test_show(recycle: Recycle) -> None:
    done = recycle("show", "tiny.yaml", "training.tokens=2k", "streams=2,8")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "# recipe file tiny.yaml"
    (tokens,) = (line for line in lines if line.startswith("  tokens:"))
    note = " command line; becomes 1,920: 15 steps of 4 blocks of 32 tokens"
    assert tokens.split("#") == [tokens.split("#")[0], note]
    assert "tokens: 2000" in tokens
    assert any(line.startswith("streams: [2, 8]") for line in lines)
    assert any("smoothing: 0.1" in line and line.endswith("# default") for line in lines)


def test_eval_gives_the_same_losses(recycle: Recycle, home: Path, tmp_path: Path) -> None:
    before = contents(home / "runs")
    out = tmp_path / "again.json"
    done = recycle("eval", "runs/tiny", "--out", out)
    assert done.returncode == 0, done.stderr
    old, new = results.read(home / "runs/tiny/results.json"), results.read(out)
    for model, same in zip(new.models, old.models, strict=True):
        assert model.name == same.name
        assert list(model.losses) == pytest.approx(list(same.losses), abs=1e-6)
    assert new.training == old.training
    assert new.command == f"recycle eval runs/tiny --out {out}"
    assert f"{new.models[-1].loss:.4f}" in done.stdout
    assert contents(home / "runs") == before

    written = out.read_bytes()
    assert_refused(recycle("eval", "runs/tiny", "--out", out), f"{out} exists already")
    assert out.read_bytes() == written


def test_eval_in_other_batches(recycle: Recycle, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "batches.json"
    done = recycle("eval", "runs/tiny", "evaluation.batch_size=1", "--out", out)
    assert done.returncode == 0, done.stderr
    new, old = results.read(out), results.read(home / "runs/tiny/results.json")
    assert new.recipe["evaluation"]["batch_size"] == 1
    for model, same in zip(new.models, old.models, strict=True):
        assert list(model.losses) == pytest.approx(list(same.losses), abs=1e-5)


def test_eval_keeps_to_the_documents_of_the_run(recycle: Recycle) -> None:
    """Another split would bring documents into test that were trained on."""
    assert_refused(
        recycle("eval", "runs/tiny", "data.seed=1", "data.test_documents=4"),
        "same documents",
        "data.seed",
        "data.test_documents",
    )


@pytest.mark.parametrize("p", [1, 2, 4])
def test_generate(recycle: Recycle, p: int) -> None:
    import recycle as package
    from tests.tiny import tiny_tokenizer

    done = recycle(
        "generate", "runs/tiny", "--prompt", "def merge", "--p", p, "--max-new-tokens", 8
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = package.load("runs/tiny", p=p), tiny_tokenizer()
    inputs = tokenizer("def merge", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    assert done.stdout == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


def test_generate_by_default_with_the_most_streams(recycle: Recycle) -> None:
    arguments = ("generate", "runs/tiny", "--prompt", "def merge", "--max-new-tokens", 12)
    default, most, bare = (recycle(*arguments, *more) for more in ((), ("--p", 4), ("--p", 1)))
    assert default.stdout == most.stdout != bare.stdout


def test_generate_from_standard_input_in_a_chat(
    recycle: Recycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("the lazy dog"))
    done = recycle("generate", "runs/tiny", "--prompt", "-", "--chat", "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert "user:" not in done.stdout  # no markup of the template, and no prompt
    assert "lazy" not in done.stdout
    assert done.stdout.strip()


def test_import_and_generate(recycle: Recycle, tmp_path: Path) -> None:
    import recycle as package
    from tests.tiny import tiny_tokenizer

    folder = tmp_path / "golden"
    assert recycle("import", GOLDEN, folder).returncode == 0
    arguments = ("generate", folder, "--prompt", "0123", "--max-new-tokens", 6)
    assert_refused(recycle(*arguments), "has a tokenizer")

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    done = recycle(*arguments)
    assert done.returncode == 0, done.stderr
    model = package.load(folder, p=2)
    inputs = tokenizer("0123", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    assert done.stdout == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    # The checkpoint's backbone was trained with its streams, so it is no P = 1.
    assert_refused(recycle(*arguments, "--p", 1), "offers P = 2, got p=1")


def test_export_and_import(recycle: Recycle, home: Path, tmp_path: Path, tiny_folder: Path) -> None:
    before = contents(home)
    out, folder = tmp_path / "upstream", tmp_path / "again"
    done = recycle("export", "runs/tiny", out, "--p", 2)
    assert done.returncode == 0, done.stderr
    assert f"Checkpoint: {out}." in done.stdout
    assert "modeling_qwen2_parscale.py beside config.json" in " ".join(done.stdout.split())
    done = recycle("import", out, folder, "--backbone", tiny_folder)
    assert done.returncode == 0, done.stderr
    weights = [path / "adapter_model.safetensors" for path in (folder, home / "runs/tiny/p2")]
    ours, expected = map(load_file, weights)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    arguments = ("--prompt", "def merge", "--max-new-tokens", 8, "--p", 2)
    texts = [recycle("generate", run, *arguments).stdout for run in (folder, "runs/tiny")]
    assert texts[0] == texts[1] != ""
    assert contents(home) == before


def test_import_of_one_stream(recycle: Recycle, tmp_path: Path, tiny_folder: Path) -> None:
    source, out = tmp_path / "p1", tmp_path / "model"
    shutil.copytree(tiny_folder, source)
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "qwen2_parscale", "parscale_n": 1}
    (source / "config.json").write_text(json.dumps(config))
    done = recycle("import", source, tmp_path / "x", "--backbone", tiny_folder)
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert "has one stream (parscale_n = 1), so no prefix and no adapter" in printed
    assert f"it is the model {tiny_folder}. Nothing was written." in printed
    assert not (tmp_path / "x").exists()
    done = recycle("import", source, out)
    assert done.returncode == 0, done.stderr
    assert f"recycle run {out}" in " ".join(done.stdout.split())
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen2"


# ---- what its user can put right


def test_bad_exports(recycle: Recycle, tmp_path: Path) -> None:
    out = (tmp_path / "new",)
    assert_refused(recycle("export", "runs/tiny", "--p", 1, *out), "P = 1 is the untouched")
    assert_refused(recycle("export", "runs/tiny", "--p", 3, *out), "offers P = 1, 2, 4, got p=3")
    assert_refused(recycle("export", "runs/tiny/control", *out), "is a control")
    assert_refused(recycle("export", "texts", *out), "holds neither")
    assert_refused(recycle("export", "runs/tiny", "texts"), "texts exists already")
    assert_refused(recycle("export", "runs/tiny", *out, "--backbone", "./no"), "no such file or fo")
    assert_refused(recycle("export", "runs/tiny", "tiny.yaml/x"), "could not be written")
    assert list(tmp_path.iterdir()) == []


def test_bad_recipes(recycle: Recycle, tmp_path: Path) -> None:
    assert_refused(recycle("run", "nowhere.yaml"), "there is no file nowhere.yaml")
    assert_refused(recycle("show", "demoo"), "did you mean demo?")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad\nstreams: [1, 2]\ntrainig:\n  tokens: many\n")
    for command in ("run", "show"):
        done = recycle(command, bad)
        assert_refused(done, "bad.yaml:2", "trainig", "training", "bad.yaml:3")
        assert done.stdout == ""


def test_bad_overrides(recycle: Recycle) -> None:
    done = recycle("run", "tiny.yaml", "training.tokns=1", "streams=1", "data.seed=x")
    assert_refused(done, "training.tokens", "P = 1 is the backbone", "whole number")


def test_unknown_models_and_data(recycle: Recycle, home: Path) -> None:
    before = contents(home / "runs")
    other = "output.dir=runs/other"
    assert_refused(recycle("run", "tiny.yaml", other, "backbone.id=./nothing"), "nothing")
    assert_refused(recycle("run", "tiny.yaml", other, "backbone.id=tiny/nothing"), "tiny/nothing")
    missing = recycle("run", "tiny.yaml", other, "data.path=nothing")
    assert_refused(missing, "data.path = nothing: there is no such file or folder", str(home))
    assert_refused(
        recycle("run", "tiny.yaml", other, "training.tokens=20M"),
        "asks for 20_000_000 tokens",
        "training.tokens=",
    )
    assert contents(home / "runs") == before
    assert not Path("runs/other").exists()


def test_a_finished_run_is_shown_without_its_data(
    recycle: Recycle, home: Path, tmp_path: Path
) -> None:
    (home / "texts").rename(tmp_path / "away")
    try:
        done = recycle("run", "tiny.yaml")
        assert "runs/tiny is finished" in done.stdout
        gone = f"data.path = {home / 'texts'}: there is no such file"
        assert f"# missing: tiny.yaml:1: {gone}" in recycle("show", "tiny.yaml").stdout
        for command in ("run", "show"):
            assert_refused(recycle(command, "tiny.yaml", "streams=1"), "2 problems", gone)
    finally:
        (tmp_path / "away").rename(home / "texts")


def test_run_folders(recycle: Recycle, home: Path, tmp_path: Path) -> None:
    before = contents(home)
    assert_refused(recycle("run", "tiny.yaml", "streams=2"), "differs in streams;")
    assert_refused(recycle("run", "tiny.yaml", "output.dir=texts"), "is no run folder")
    assert_refused(recycle("run", "tiny.yaml", "output.dir=tiny.yaml/x"), "Cannot write in")
    assert contents(home) == before


def test_torn_results(recycle: Recycle, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs/tiny", tmp_path / "torn")
    file = tmp_path / "torn" / "results.json"
    file.write_text(file.read_text()[:500])
    for arguments in (
        ("run", "tiny.yaml", f"output.dir={tmp_path / 'torn'}"),
        ("eval", tmp_path / "torn"),
    ):
        assert_refused(recycle(*arguments), "results.json is damaged or incomplete")


def test_torn_adapters(recycle: Recycle, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs/tiny", tmp_path / "torn")
    weights = tmp_path / "torn" / "p4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for arguments in (
        ("generate", tmp_path / "torn", "--prompt", "a"),
        ("eval", tmp_path / "torn"),
    ):
        assert_refused(recycle(*arguments), "p4/adapter_model.safetensors")
    (tmp_path / "torn" / FAMILY_FILE).write_text("{")
    for arguments in (
        ("generate", tmp_path / "torn", "--prompt", "a"),
        ("eval", tmp_path / "torn"),
    ):
        assert_refused(recycle(*arguments), FAMILY_FILE)


def test_generate_refuses(recycle: Recycle, tmp_path: Path) -> None:
    refused = recycle("generate", "runs/tiny", "--prompt", "a", "--p", 3)
    assert_refused(refused, "offers P = 1, 2, 4, got p=3")
    assert_refused(recycle("generate", "runs/nothing", "--prompt", "a"), "runs/nothing")
    unheard = recycle("generate", "runs/tiny", "--prompt", "a", "--seed", 1)
    assert_refused(unheard, "--top-p and --seed are of sampling; add --temperature")
    asked = ("generate", "runs/tiny", "--prompt", "a", "--temperature", 1)
    for seed, bound in ((-1, "greater than or equal to 0"), (10**30, f"equal to {2**63 - 1}")):
        assert bound in recycle(*asked, "--seed", seed).stderr
    assert_refused(recycle("generate", "texts", "--prompt", "a"), FAMILY_FILE)
    assert_refused(recycle("generate", "runs/tiny", "--prompt", ""), "The prompt has no tokens")
    shutil.copytree("runs/tiny", tmp_path / "torn")
    (tmp_path / "torn" / "tokenizer.json").write_text('{"version": "1.0"')
    torn = recycle("generate", tmp_path / "torn", "--prompt", "a")
    assert_refused(torn, f"'{tmp_path / 'torn'}' has no tokenizer that transformers can load (")


def test_eval_refuses(recycle: Recycle, tmp_path: Path) -> None:
    assert_refused(recycle("eval", "texts"), "texts is no finished run")
    assert_refused(recycle("eval", "nowhere"), "There is no folder nowhere.")
    assert_refused(recycle("eval", "runs/tiny", "training.tokens=5"), "training.tokens")
    other = recycle("eval", "runs/tiny", "output.dir=x", "logging.steps=3", "evaluation.speed=true")
    assert_refused(other, "backbone.quantization only, got output.dir, logging.steps.")
    assert_refused(
        recycle("eval", "runs/tiny", "--out", tmp_path / "no" / "new.json"), "there is no folder"
    )


def test_import_refuses(recycle: Recycle, home: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert_refused(recycle("import", "./nothing", "new"), "there is no such file or folder")
    assert_refused(recycle("import", "nothing", "new"), "the files of model 'nothing'")
    assert_refused(recycle("import", tiny_folder, "new"), "no checkpoint in upstream's")
    assert_refused(recycle("import", GOLDEN, "texts"), "texts exists already")
    assert_refused(recycle("import", GOLDEN, "new", "--backbone", tiny_folder))
    assert not Path("new").exists()


def test_odd_words(recycle: Recycle, tiny_folder: Path, tmp_path: Path) -> None:
    long = "x" * 300
    assert_refused(recycle("run", "tiny.yaml", "output.dir=runs/other", f"data.path={long}"))
    assert_refused(
        recycle("run", "tiny.yaml", "output.dir=runs/other", "data.path=/x/[/b]"), "[/b]"
    )
    assert_refused(recycle("generate", "runs/tiny", "--prompt", "\udcff"), "not text in UTF-8")
    long_prompt = recycle("generate", "runs/tiny", "--prompt", "a", "--max-new-tokens", 5000)
    assert_refused(long_prompt, "the backbone's window is 1024")
    assert not Path("runs/other").exists()


def test_version(recycle: Recycle) -> None:
    done = recycle("--version")
    assert done.stdout == f"recycle {__version__}\n"


def test_usage(recycle: Recycle) -> None:
    for arguments in (("rum",), ("run",), ("generate", "runs/tiny"), ("show", "demo", "--fast")):
        done = recycle(*arguments)
        assert done.returncode == 2
        assert "Usage: " in done.stderr


def test_a_bug_keeps_its_traceback(recycle: Recycle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("recycle.recipe.resolve", broken)
    with pytest.raises(ValueError, match="a bug"):
        recycle("show", "demo")


def without(modules: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command where some modules are not installed."""
    script = (
        f"import sys; sys.modules |= dict.fromkeys({modules}); "
        f"sys.argv = ['recycle', *{list(arguments)}]; from recycle.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )


def test_a_missing_extra() -> None:
    done = without(["datasets"], "run", "tiny.yaml", "output.dir=runs/other")
    assert_refused(done, "This needs datasets: pip install 'recycle-lm[train]'")


def test_the_base_install_generates() -> None:
    extras = ["datasets", "matplotlib", "gguf", "bitsandbytes"]
    arguments = ["runs/tiny", "--prompt", "a b", "--max-new-tokens", "2"]
    done = without(extras, "generate", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a b")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 kB; grown by the test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("size", "processes"), [("40k", 1), ("120k", 1), ("200k", 1), ("400k", 1), ("300k", 2)]
)
def test_a_full_disk(
    recycle: Recycle, home: Path, small_disk: Path, size: str, processes: int
) -> None:
    """Sizes for which the disk is full in other files: adapters, optimizer, trainer's state."""
    subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)
    arguments = ("run", "tiny.yaml", f"output.dir={small_disk / 'run'}")
    arguments += (f"launch.processes={processes}",)
    command = recycle if processes == 1 else partial(run_command, cwd=home)
    assert_refused(command(*arguments), "could not be written", "Make room")
    kept = list(small_disk.rglob("checkpoint-*"))
    assert all((checkpoint / "complete").is_file() for checkpoint in kept)
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    found = results.read(small_disk / "run" / "results.json")
    expected = results.read(home / "runs/tiny/results.json")
    for model, same in zip(found.models, expected.models, strict=True):
        assert list(model.losses) == pytest.approx(list(same.losses), abs=1e-5)


# ---- help


def test_help_imports_no_room() -> None:
    script = (
        "import sys, json; sys.argv = ['recycle', '--help']\n"
        "from recycle.cli import main\n"
        "try: main()\n"
        "finally: print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stderr)}
    assert not loaded & {"torch", "transformers", "peft", "pydantic", "datasets", "ruamel"}
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_the_command_takes(name: str) -> None:
    command = COMMANDS[name]
    program, given, *arguments = shlex.split((command.epilog or "").removeprefix("Example: "))
    assert (program, given) == ("recycle", name)
    context = command.make_context(name, arguments)
    assert set(context.params) == {parameter.name for parameter in command.params} - {"help"}
    undescribed = [x.name for x in command.params if not getattr(x, "help", None)]
    assert undescribed == []


def test_help_costs_little_more_than_typer_and_rich() -> None:
    def seconds(*arguments: str) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments],
                env=environment(),
                stdout=subprocess.DEVNULL,
                check=True,
            )
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    ours = seconds("-m", "recycle", "--help")
    # Measured: 0.03 s more; generous, since other tests run beside this one.
    assert ours - seconds("-c", "import typer, rich.console") < 0.3


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "/nosuchfolder"),
        ("eval", "runs/tiny", "training.tokens=5"),
        ("eval", "runs/tiny", "--p", "9"),
        ("eval", "runs/tiny", "--tasks", "./no.yaml"),
        ("eval", "runs/tiny", "--tasks", "humaneval"),
        ("eval", "runs/tiny", "data=files"),
        ("generate", "./nosuchfolder", "--prompt", "a"),
        ("generate", "runs/tiny", "--prompt", "a", "--p", "3"),
        ("export", "runs/tiny", "texts"),
        ("export", "runs/tiny", "new", "--p", "7"),
        ("export", "runs/tiny", "new", "--p", "1"),
        ("export", "runs/tiny/control", "new"),
        ("import", "./nosuchfolder", "new"),
        ("import", "texts", "new"),
        ("import", "./plain", "new"),
        ("import", "./plain", "new", "--backbone", "./nosuchfolder"),
        ("generate", "runs/tiny", "--prompt", "a", "--backbone", "./nosuchfolder"),
        ("export", "runs/tiny", "new", "--backbone", "texts"),
        ("run", "tiny.yaml", "streams=2"),
        ("run", "tiny.yaml", "data.path=./nothing", "output.dir=runs/other"),
        ("run", "tiny.yaml", "data.source=jsonl", "output.dir=runs/other"),
        ("run", "tiny.yaml", "data=python-code", "data.path=texts", "output.dir=runs/other"),
        ("run", "tiny.yaml", "backbone.id=texts", "output.dir=runs/other"),
        ("run", "tiny.yaml", "training.tokns=5"),
        ("run", "tiny.yaml"),
        ("show", "tiny.yaml"),
        ("show",),
    ],
)
def test_what_needs_no_library_is_told_without_one(home: Path, arguments: tuple[str, ...]) -> None:
    """A finished run's table and `show` as well: torch alone takes seconds to import."""
    (home / "plain").mkdir(exist_ok=True)
    (home / "plain" / "config.json").write_text('{"model_type": "qwen2"}')
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['torch', 'transformers', 'peft', 'datasets'])\n"
        "from recycle.cli import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    fine = arguments == ("run", "tiny.yaml") or arguments[0] == "show"
    assert done.returncode == (0 if fine else 2), done.stderr


def test_standard_input_that_is_closed(home: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m recycle generate runs/tiny --prompt - <&-",
        shell=True,
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert_refused(done, "reads standard input, which is closed")


def test_a_new_run_beside_a_finished_one(recycle: Recycle) -> None:
    done = recycle("run", "tiny.yaml", "training.tokens=128", "--new", "output.dir=runs/beside")
    assert done.returncode == 0, done.stderr
    again = recycle("run", "tiny.yaml", "training.tokens=128", "--new", "output.dir=runs/beside")
    assert again.returncode == 0, again.stderr
    assert Path("runs/beside-2/results.json").is_file()


def test_eval_on_a_backbone_that_moved(
    recycle: Recycle, home: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder, moved)
    out = tmp_path / "again.json"
    done = recycle("eval", "runs/tiny", "--backbone", moved, "--out", out)
    assert done.returncode == 0, done.stderr
    new, old = results.read(out), results.read(home / "runs/tiny/results.json")
    assert [model.losses for model in new.models] == [model.losses for model in old.models]
    assert_refused(recycle("eval", "runs/tiny", "--backbone", "./no"), "no such file or folder")


def test_other_commands_work_in_one_process(tmp_path: Path) -> None:
    done = run_command("show", "demo", cwd=tmp_path, env=environment(WORLD_SIZE="4", RANK="0"))
    assert_refused(done, "`recycle show` works in one process", "started 4")
