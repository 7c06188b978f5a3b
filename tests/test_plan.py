"""`recycle plan`: what inference and training take, told from the config alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from recycle import results
from recycle.backbone.skeleton import load_skeleton
from recycle.cost import CostError, PassCost, Work, find_gpu, total
from recycle.cost.forecast import Forecast
from recycle.cost.gpu import FILE, known_as
from recycle.cost.inference import Numbers, Request, estimate
from recycle.cost.scaling import paper_example
from recycle.cost.shape import Shape, count_outside_embeddings, model_shape
from recycle.cost.table import render
from recycle.cost.training import Learner, largest_micro_batch, memory, operations
from recycle.law import PAPER
from recycle.recipe import resolve
from recycle.recipe.schema import Backbone
from recycle.report.document import render_report
from recycle.run.folder import RunError
from recycle.run.forecast import forecast
from tests.families.configs import family_model
from tests.runs import command_here, write_recipe
from tests.test_run import go
from tests.tiny import save_tiny, tiny_model

# Upstream's own figures: `cost_analysis.py` of QwenLM/ParScale over llm-analysis, 36 layers, 16
# heads, 2 key-value heads, 151,936 tokens; hidden, intermediate, P, batch, in, out -> GiB, s.
UPSTREAM = [
    ((2560, 13824, 1, 1, 64, 64), 8.856, 0.337),
    ((2560, 13824, 2, 2, 64, 64), 8.951, 0.354),
    ((1536, 8320, 1, 1, 64, 64), 3.383, 0.128),
    ((1536, 8320, 8, 1, 64, 64), 3.465, 0.144),
    ((1536, 8320, 4, 4, 256, 256), 3.954, 0.655),
    ((2048, 11008, 1, 1, 64, 64), 5.770, 0.219),
    ((2048, 11008, 8, 8, 512, 512), 9.434, 4.150),
    ((2048, 11008, 8, 1, 1, 512), 5.978, 1.831),
]
QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


@pytest.fixture
def plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """`recycle plan` in this process: its status, standard output and standard error."""

    here = command_here(capsys, monkeypatch)

    def command(*arguments: object) -> tuple[int, str, str]:
        done = here("plan", *arguments)
        return done.returncode, done.stdout, done.stderr

    return command


def config_folder(folder: Path, **fields: Any) -> Path:
    """A model folder with a config.json, and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN2 | fields))
    return folder


def skeleton_shape(folder: Path, **fields: Any) -> Shape:
    return model_shape(load_skeleton(Backbone(id=str(config_folder(folder, **fields))))[0])


# ---- inference


@pytest.mark.parametrize(("case", "gib", "seconds"), UPSTREAM, ids=str)
def test_upstreams_figures_are_reproduced(
    plan: Any, tmp_path: Path, case: tuple[int, ...], gib: float, seconds: float
) -> None:
    hidden, intermediate, p, batch, inputs, outputs = case
    # Upstream counts the embedding once, and computes in 16 bits, whatever a config says.
    other = {"tie_word_embeddings": p > 1, "torch_dtype": "float32" if p > 2 else "bfloat16"}
    folder = config_folder(
        tmp_path / "m", hidden_size=hidden, intermediate_size=intermediate, **other
    )
    request = ("--batch", batch, "--input", inputs, "--output", outputs)
    status, out, _ = plan(folder, "--gpu", "a100-80gb", "--p", f"1,{p}", *request, "--json")
    assert status == 0
    found = json.loads(out)  # nothing else is on standard output
    assert [x["p"] for x in found["estimates"]] == sorted({1, p})
    last = found["estimates"][-1]
    assert last["memory_gib"] == pytest.approx(gib, rel=0.005)  # they are rounded
    assert last["latency_s"] == pytest.approx(seconds, rel=0.005)
    assert last["latency_s"] == pytest.approx(last["prefill_s"] + outputs * last["token_s"])
    head = 0 if p > 1 else 2 * hidden * 151936 / 2**30
    assert found["output_head_gib"] == pytest.approx(head)


def test_what_a_skeleton_counts_is_the_models(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    skeleton, _ = load_skeleton(Backbone(id=str(tmp_path / "m")))
    shape = model_shape(skeleton)
    assert shape.parameters == skeleton.num_parameters() == model.num_parameters()
    assert shape == model_shape(model)
    outside = model.num_parameters() - 2 * model.lm_head.weight.numel()
    assert shape.non_embedding == outside == count_outside_embeddings(model)
    assert sum(x.untyped_storage().nbytes() for x in skeleton.parameters()) < 4 * 100


def test_of_experts_a_token_passes_through_its_own() -> None:
    model = family_model("mixtral")  # 4 experts in each of 2 layers, of which 2 for a token
    shape = model_shape(model)
    experts = sum(x.numel() for n, x in model.named_parameters() if "expert" in n and x.ndim == 3)
    assert experts > 0
    assert shape.active_mlp == shape.mlp - experts / 2


def test_latent_attention_has_keys_and_values_of_their_own_sizes() -> None:
    model = family_model("deepseek_v3")
    config, shape = model.config, model_shape(model)
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    size = shape.layers * config.num_attention_heads * (key + config.v_head_dim)
    assert shape.keys_values == shape.scores == size


def test_quantised_matrices_take_less(tmp_path: Path) -> None:
    shape = skeleton_shape(tmp_path / "m", hidden_size=1536, intermediate_size=8320)
    gpu, request = find_gpu("rtx-4090"), Request()
    whole, nf4 = (estimate(shape, gpu, 1, request, Numbers(quantization=x)) for x in (None, "nf4"))
    saved = (shape.attention + shape.mlp) * (2 - 0.516) / 2**30
    assert whole.weights_gib - nf4.weights_gib == pytest.approx(saved)
    assert nf4.token_s < whole.token_s / 2  # decoding waits for the weights


def test_stacks_of_experts_are_not_quantised() -> None:
    model = family_model("mixtral")
    shape, gpu = model_shape(model), find_gpu("rtx-4090")
    experts = sum(x.numel() for n, x in model.named_parameters() if "expert" in n and x.ndim == 3)
    assert shape.experts == experts > 0
    whole, nf4 = (Numbers(quantization=x) for x in (None, "nf4"))
    saved = (shape.attention + shape.mlp - experts) * (2 - 0.516) / 2**30
    first, second = (estimate(shape, gpu, 1, Request(), x).weights_gib for x in (whole, nf4))
    assert first - second == pytest.approx(saved)
    learner = Learner((2,), 0, False, block_size=8, prefix=4)
    first, second = (memory(shape, x, learner, 1) for x in (whole, nf4))
    assert first - second == pytest.approx(saved)


# ---- GPUs


def test_a_gpu_without_bfloat16_is_planned_for_in_float32(plan: Any, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "m", hidden_size=64, intermediate_size=128)
    found = [
        json.loads(plan(folder, "--gpu", x, "--p", 1, "--json")[1])["dtype"] for x in ("t4", "l4")
    ]
    assert found == ["float32", "bfloat16"]


def test_the_file_of_gpus_can_be_read_and_goes_from_12_gib_to_an_h200() -> None:
    entries = YAML(typ="safe").load(FILE.read_text())
    found = [find_gpu(name) for name in entries]
    assert min(x.memory_gib for x in found) == 12
    assert find_gpu("H200").memory_gib == 141
    a100 = find_gpu("a100-80gb")
    assert (a100.tflops, a100.bandwidth) == (312, 2039)
    assert all(x.float32 < x.tflops < 3000 and 200 < x.bandwidth < 10000 for x in found)
    assert all(x.dtype in ("bfloat16", "float16") for x in found)


def test_gpus_by_the_names_that_torch_gives_them() -> None:
    named = {
        ("NVIDIA H100 80GB HBM3", 79.1): "h100-80gb",
        ("NVIDIA H100 PCIe", 79.1): "h100-pcie-80gb",
        ("NVIDIA A100-SXM4-40GB", 39.4): "a100-40gb",
        ("NVIDIA A100 80GB PCIe", 79.3): "a100-pcie-80gb",
        ("NVIDIA A100-SXM4-80GB", 79.3): "a100-80gb",
        ("NVIDIA GeForce RTX 3060", 11.8): "rtx-3060-12gb",
        ("NVIDIA GeForce RTX 4070 Ti", 11.7): None,
        ("Tesla T4", 14.6): "t4",
        ("NVIDIA H200", 139.8): "h200",
    }
    found = {key: known_as(*key) for key in named}
    assert {key: gpu and gpu.name for key, gpu in found.items()} == named


# ---- training


def test_the_price_is_one_sum() -> None:
    cost = PassCost(learning=0.5, reading=0.25, gib=3.0)
    works = [Work("nested", 10, 4, cost), Work("backbone", 0, 8, PassCost(1.0, 0.5, 2.0))]
    assert total(works) == (10 * 0.5 + 4 * 0.25 + 8 * 0.5, 3.0)
    whole = cost.with_all_weights(2**30, itemsize=2)
    assert whole == PassCost(0.75, 0.25, 3.0 + 14)


def test_operations_of_a_token(tmp_path: Path) -> None:
    """4 N P with streams on frozen weights, and 2 N P more where activations are computed twice."""
    shape = skeleton_shape(tmp_path / "m", hidden_size=2048, intermediate_size=11008)
    n = shape.attention + shape.mlp
    one = Learner((1,), 0, False, block_size=1, prefix=0)
    head = 2 * shape.vocabulary * 2048
    learning, reading = operations(shape, one)
    assert reading == pytest.approx(2 * n + head, rel=1e-3)
    assert learning == pytest.approx(4 * n + 2 * head, rel=1e-3)
    nested = replace(one, p_values=(2, 4, 8))
    assert operations(shape, nested)[0] == pytest.approx(8 * 4 * n + 3 * 2 * head, rel=0.02)
    again = operations(shape, nested, checkpointing=True)[0] - operations(shape, nested)[0]
    assert again == pytest.approx(operations(shape, nested)[1])


def test_the_micro_batch_that_fits(tmp_path: Path) -> None:
    shape = skeleton_shape(tmp_path / "m", hidden_size=2048, intermediate_size=11008)
    learner = Learner((2, 4, 8), 65_832_974, False, block_size=1024, prefix=48)
    numbers, card = Numbers(), find_gpu("l40s")
    plain = largest_micro_batch(shape, numbers, card, learner, 32, checkpointing=False)
    again = largest_micro_batch(shape, numbers, card, learner, 32, checkpointing=True)
    assert plain == 1
    assert again is not None
    assert again > plain
    assert memory(shape, numbers, learner, again, True) < 0.9 * 48
    assert memory(shape, numbers, learner, 2 * again, True) > 0.9 * 48
    small = find_gpu("rtx-3060-12gb")
    assert largest_micro_batch(shape, numbers, small, learner, 32, checkpointing=False) is None
    assert largest_micro_batch(shape, numbers, find_gpu("b200"), learner, 12, True) == 4  # of 12


def test_auto_is_planned_as_what_fits(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, save_tiny(tmp_path / "model"), **{"training.micro_batch_size": "auto"}
    )
    planned = forecast(resolve(str(recipe)).recipe, "h200", (), Request())
    assert [x.micro_batch_size for x in planned.training] == [4, 4]  # of batches of 4


def test_processes_share_a_training(tmp_path: Path) -> None:
    """Time and batch are divided; of a backbone that is shared out, every GPU holds a part."""
    sizes = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 32}
    model = config_folder(tmp_path / "model", **sizes)

    def planned(gpu: str, micro: Any = "auto", **launch: Any) -> Forecast:
        settings = {f"launch.{name}": value for name, value in launch.items()}
        settings |= {"training.micro_batch_size": micro, "training.batch_size": 8}
        recipe = resolve(str(write_recipe(tmp_path, model, **settings))).recipe
        return forecast(recipe, gpu, (), Request())

    one, four = planned("h200", 2), planned("h200", 2, processes=4)
    assert (one.processes, four.processes, four.sharded) == (1, 4, False)
    assert four.training_seconds == pytest.approx(one.training_seconds / 4)
    cut = planned("h200", processes=4, parallel="fsdp")
    assert [x.micro_batch_size for x in cut.training] == [2, 2]  # all that a process has of a step
    weights = cut.estimates[0].weights_gib
    saved = max(x.memory_gib for x in four.training) - max(x.memory_gib for x in cut.training)
    assert 0.5 * weights < saved < 0.75 * weights
    titles = [str(x.title) for x in render(cut) if not isinstance(x, str)]
    alone = "Training on 4 GPUs, without the time they wait for each other"
    assert f"{alone}, each with a part of the backbone" in titles
    small = "rtx-3060-12gb"  # has no room for the whole
    assert planned(small, processes=4).sharded
    assert not planned(small).sharded
    with pytest.raises(RunError, match="3 processes share out the blocks of a step"):
        planned("h200", processes=3)


def test_a_run_keeps_what_was_announced_and_is_as_planned(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=4)
    budget: dict[str, Any] = {"stages.adapt.train": "lora", "stages.adapt.tokens": 256}
    budget |= {"training.tokens": 512, "evaluation.compare": ["lora"]}
    # On a CPU the counter sees attention only where it is written as products of matrices.
    budget |= {"output.dir": str(tmp_path / "run"), "backbone.attn_implementation": "eager"}
    recipe = write_recipe(tmp_path, model, **budget)
    planned = forecast(resolve(str(recipe)).recipe, None, (), Request())
    record, printed = go(recipe)
    assert [x.name for x in planned.training] == [x.name for x in record.training]
    for told, took in zip(planned.training, record.training, strict=True):
        assert told.tokens == took.tokens
        # Nothing is passed back below the first of four layers.
        assert told.flops / told.tokens == pytest.approx(took.flops_per_token, rel=0.1)
    adapters = {x.name: x.adapter_parameters for x in record.models}
    assert record.estimates is not None
    estimated = {f"P = {x.p}": x.adapter_parameters for x in record.estimates.estimates}
    assert estimated == {"P = 1": 0} | {x: adapters[x] for x in ("P = 2", "P = 4")}
    learned = {x.name: x.learned_parameters for x in planned.training}
    assert learned["adapted"] == adapters["LoRA"]
    assert learned["control"] == adapters["control"]
    assert record.estimates.gpu == "h200"
    assert record.estimates.dtype == "float32"
    backbone = record.backbone
    assert planned.non_embedding_parameters == backbone.non_embedding_parameters
    assert backbone.non_embedding_parameters == backbone.parameters - 2 * 384 * 64  # two tables
    memory_gib = record.memory_gib
    assert memory_gib is not None
    assert f"and {memory_gib.announced:.1f} GiB of memory" in printed
    assert memory_gib.announced <= memory_gib.taken * 1.5
    report = render_report(results.read(tmp_path / "run" / "results.json"))
    told_and_took = f"{memory_gib.announced:.2f} GiB; it took {memory_gib.taken:.2f} GiB."
    assert f"Peak memory announced: {told_and_took}" in report


# ---- parameter scaling


def test_a_wider_model_has_as_many_parameters_as_it_was_asked_for(tmp_path: Path) -> None:
    shape = skeleton_shape(tmp_path / "m", hidden_size=1536, intermediate_size=8320)
    wide = shape.widened(2 * shape.non_embedding)
    assert wide.non_embedding == pytest.approx(2 * shape.non_embedding)
    assert wide.hidden == pytest.approx(1536 * 2**0.5, rel=1e-3)
    assert wide.layers == 36


def test_the_papers_example_and_why_it_differs() -> None:
    found = paper_example()
    assert found.memory_ratio == pytest.approx(31.2, abs=0.1)
    assert found.latency_ratio == pytest.approx(6.4, abs=0.1)
    # Computed as the paper does, it is what the paper says.
    assert found.averaged_memory_ratio == pytest.approx(22, abs=1)
    assert found.averaged_latency_ratio == pytest.approx(6, abs=0.5)


# ---- the command


def test_what_people_see(plan: Any, tmp_path: Path) -> None:
    folder = config_folder(
        tmp_path / "m", hidden_size=1536, intermediate_size=8320, max_position_embeddings=100
    )
    status, out, _ = plan(folder, "--p", "8,1", "training.tokens=50M")
    assert status == 0
    assert "GPU: h200, 141 GiB (this machine has no GPU)" in out
    tables = [line for line in out.splitlines() if "  " in line]
    assert max(map(len, tables)) <= 80
    law = PAPER["stack-v2-python"].equal_parameters(1_571_000_000, 8)
    assert f"{law / 1e9:.2f}B parameters" in out
    assert "gives 31x and 6.4x here, and 22x and 6x in the paper" in out
    assert "128 tokens in and out are more than the model's window of 100" in out
    found = json.loads(plan(folder, "--p", "1,8", "training.tokens=50M", "--json")[1])
    assert [x["name"] for x in found["training"]] == ["adapted", "nested", "control"]
    assert found["training"][1]["p_values"] == [8]
    alone = sum(x["seconds"] for x in found["training"])
    assert alone < found["training_seconds"] < 1.2 * alone  # the comparison is the smaller part
    # To within a step: 40M and 10M of them.
    assert found["training"][0]["tokens"] + found["training"][1]["tokens"] == pytest.approx(
        50_000_000, rel=0.01
    )
    assert found["scaling"]["memory_ratio"] == pytest.approx(31.2, abs=0.1)


QWEN_3B = {"hidden_size": 2048, "intermediate_size": 11008, "num_key_value_heads": 2}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("gpu", ["rtx-4090", "rtx-3090"])
@pytest.mark.parametrize(
    ("recipe", "shape", "parameters", "gib"),
    [
        ("qwen2.5-3b-python", QWEN_3B, 3_085_938_688, 10.9),
        ("qwen2.5-7b-4bit", QWEN_7B, 7_615_616_512, 11.2),
    ],
    ids=["3b", "7b"],
)
def test_recipes_for_one_card_of_24_gb(
    plan: Any,
    tmp_path: Path,
    gpu: str,
    recipe: str,
    shape: dict[str, Any],
    parameters: int,
    gib: float,
) -> None:
    folder = config_folder(tmp_path / "m", max_position_embeddings=32768, **shape)
    status, out, errors = plan(recipe, f"backbone.id={folder}", "--gpu", gpu, "--json")
    assert status == 0, errors
    found = json.loads(out)
    assert found["parameters"] == parameters  # what the model card says
    assert found["gpu_memory_gib"] == 24
    assert found["training_memory_gib"] == pytest.approx(gib, abs=0.05)
    assert found["training_memory_gib"] + found["output_head_gib"] <= 0.9 * 24
    assert [x["name"] for x in found["training"]] == ["compared", "adapted", "nested", "control"]


def test_what_is_refused(plan: Any, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "m", hidden_size=64, intermediate_size=128)
    (tmp_path / "empty").mkdir()
    config_folder(tmp_path / "bert", model_type="bert", architectures=["BertForMaskedLM"])
    config_folder(tmp_path / "odd", hidden_size="wide")
    small = {"hidden_size": 64, "intermediate_size": 128}
    config_folder(tmp_path / "heads", **small, num_key_value_heads=3)
    config_folder(tmp_path / "none", **small, vocab_size=0)
    config_folder(tmp_path / "one", **small, vocab_size=1)
    mamba = config_folder(
        tmp_path / "mamba", model_type="mamba", architectures=["MambaForCausalLM"]
    )
    (mamba / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 2}')
    cases: list[tuple[tuple[object, ...], str]] = [
        ((folder, "--gpu", "abacus"), "rtx-3060-12gb (12 GiB)"),
        ((folder, "--p", "0,2"), "whole numbers of streams from 1 to 1,024"),
        ((folder, "--p", "1,1025"), "got '1,1025'"),
        ((folder, "--batch", 2**20 + 1), "less than or equal to 1048576"),
        ((folder, "--input", 10**9), "less than or equal to 1048576"),
        ((folder, "--output", 10**9), "less than or equal to 1048576"),
        ((folder, "--p", "two"), "got 'two'"),
        ((folder, "--batch", "0"), "--batch"),
        ((folder, "--input", "0"), "--input"),
        ((folder, "--output", "-1"), "--output"),
        ((tmp_path / "empty",), "no config.json"),
        ((tmp_path / "bert",), "a backbone must be a causal language model"),
        ((tmp_path / "odd",), "describes no model that transformers can build"),
        ((tmp_path / "odd",), "got str"),
        ((tmp_path / "heads",), "sizes that do not fit together"),
        ((tmp_path / "none",), "fewer than two tokens"),
        ((tmp_path / "one",), "fewer than two tokens"),
        ((mamba,), "has none: its layers are recurrent"),
        (("Qwen/Qwen-there-is-none",), "cannot reach the Hub"),
    ]
    for arguments, message in cases:
        status, out, err = plan(*arguments)
        assert (status, out) == (2, ""), arguments
        assert message in err, (arguments, err)
        assert "Traceback" not in err


def test_an_unknown_gpu_is_told_with_those_known() -> None:
    with pytest.raises(CostError, match=r"'abacus'.*h200 \(141 GiB\)"):
        find_gpu("abacus")
