"""Tasks of lm-evaluation-harness: its task files, requests and metrics; only the model is ours.

Wants the extra `eval`.
"""

import contextlib
import copy
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from recycle.backbone.generation import decoding
from recycle.parscale import ActiveStreams, choose_streams
from recycle.recipe.problems import nearest

from .exams import Scores, digest
from .measurement import EvaluationError

SHIPPED = Path(__file__).with_name("tasks")
SEED = 1234  # of what the harness draws: few-shot examples
WINDOW = 4096  # tokens at most: a batch is tried at its longest
MOST_AT_ONCE = 64  # documents in a batch that is found by trying
# Metrics of log-likelihoods, which the harness adds up before it takes the exponential, say the
# same as a loss: of a document, or of what its text is counted in.
LOSSES = {
    "perplexity": "loss of the answer",
    "word_perplexity": "loss per word",
    "byte_perplexity": "loss per byte",
}


class Listener:
    """Stands where the harness has its cache of answers, which is told of every one."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.advance(1)


class FamilyLM(HFLM):
    """A model that is in memory already, with the streams in use; shows no bars of its own."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None,
        advance: Callable[[int], None],
    ) -> None:
        """Wrap a model.

        Args:
            model: A causal LM, or a PEFT model of one.
            tokenizer: The backbone's.
            batch_size: None is the largest that fits, found for the streams in use.
            advance: Called with the requests done.
        """
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # which it may give a token for padding
            batch_size="auto" if batch_size is None else batch_size,
            max_batch_size=MOST_AT_ONCE,
            max_length=min(window, WINDOW),
        )
        self.set_cache_hook(Listener(advance))

    @property
    def max_gen_toks(self) -> int:
        return min(256, self.max_length // 2)  # where a task does not say; the prompt needs room

    def _loglikelihood_tokens(self, *args: Any, **options: Any) -> Any:
        return super()._loglikelihood_tokens(*args, **options | {"disable_tqdm": True})

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        before: int | str = self.batch_size
        if before == "auto":
            self.batch_size_per_gpu = self._detect_batch_size()
        with decoding(self.model):
            said: list[str] = super().generate_until(requests, disable_tqdm=True)
        self.batch_size_per_gpu = before
        return said


class HarnessExam:
    """One task of the harness."""

    def __init__(
        self,
        task: Any,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None,
        precision: str,
    ) -> None:
        self.task, self.tokenizer, self.batch_size = task, tokenizer, batch_size
        self.name: str = task.config.task
        with quiet():
            task.set_fewshot_seed(SEED)
            if task.config.num_fewshot is None:
                task.set_config(key="num_fewshot", value=0)
            task.build_all_requests(rank=0, world_size=1)
        self.amount = len(task.instances)
        self.settings: dict[str, JsonValue] = {
            "documents": len({x.doc_id for x in task.instances}),
            # The documents hold the answers too, the config the metrics and filters.
            "task": digest([[(x.args, x.doc) for x in task.instances], _config(task)]),
            "few_shot": task.config.num_fewshot,
            "lm_eval": lm_eval.__version__,
            "precision": precision,
        }

    def take(
        self, model: Any, active: ActiveStreams | None, advance: Callable[[int], None]
    ) -> list[Scores]:
        with choose_streams(model, active), quiet():
            lm = FamilyLM(model, self.tokenizer, self.batch_size, advance)
            torch.manual_seed(SEED)
            self.task.set_fewshot_seed(SEED)
            tasks = {"tasks": {self.name: self.task}, "groups": {}, "group_map": {}}
            found = evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0, log_samples=True)
        samples, results = found["samples"][self.name], found["results"][self.name]
        higher = found["higher_is_better"][self.name]
        scores = []
        for key, aggregated in results.items():
            metric, _, filter_name = key.partition(",")
            values = [x.get(metric) for x in samples if x["filter"] == filter_name]
            score = _scores(
                metric, filter_name, values, aggregated, higher.get(metric) is not False
            )
            scores += [score] if score else []
        if not scores:
            raise EvaluationError(
                f"No metric of the task {self.name} is a mean over documents ({', '.join(results)})"
                ", so differences between rows have no standard error. Choose another task."
            )
        return scores


def _config(task: Any) -> dict[str, Any]:
    """What a task's file says but for where it lies."""
    config: dict[str, Any] = task.config.to_dict()
    return {key: x for key, x in config.items() if key not in ("dataset_kwargs", "metadata")}


def _scores(
    metric: str, filter_name: str, values: list[Any], aggregated: Any, higher: bool
) -> Scores | None:
    """A metric document by document; None where the harness's number is no mean of such values."""
    if not values or not isinstance(aggregated, int | float):
        return None
    name = metric if filter_name in ("none", "") else f"{metric},{filter_name}"
    if metric in LOSSES:
        pairs = [x if isinstance(x, tuple) else (x, 1) for x in values]
        weights = tuple(int(weight) for _, weight in pairs)
        losses = tuple(-log / weight for (log, _), weight in zip(pairs, weights, strict=True))
        mean = math.fsum(-log for log, _ in pairs) / sum(weights)
        if not math.isclose(mean, math.log(aggregated), rel_tol=1e-6, abs_tol=1e-9):
            return None
        return Scores(LOSSES[metric], False, losses, weights if set(weights) != {1} else None)
    if not all(isinstance(x, int | float) for x in values):
        return None
    numbers = tuple(map(float, values))
    if not math.isclose(math.fsum(numbers) / len(numbers), aggregated, rel_tol=1e-6, abs_tol=1e-9):
        return None
    return Scores(name, higher, numbers)


def find_tasks(names: Sequence[str], apart: Sequence[tuple[int, int]] = ()) -> list[Any]:
    """Tasks by name, or of a task file or a folder of these; nothing is asked of a model.

    The harness's own are looked through only for names that are not shipped here: it takes a while.

    Args:
        names: Of tasks, groups, YAML files or folders.
        apart: For the shipped tasks: see `recycle.data.tasks.make_tasks`.

    Raises:
        EvaluationError: There is no such task, it cannot be loaded, or it runs code.
    """
    metadata = {"apart": [list(x) for x in apart]}
    shipped = TaskManager(include_path=str(SHIPPED), include_defaults=False, metadata=metadata)
    its_own: Any = None
    found: dict[str, Any] = {}
    for name in names:
        manager, wanted = shipped, [name]
        if (path := Path(name)).is_dir():
            manager = TaskManager(include_path=str(path), include_defaults=False)
            wanted = manager.all_subtasks
        elif path.suffix in (".yaml", ".yml"):
            wanted = [str(path.absolute())]
        elif name not in shipped.all_tasks:
            its_own = manager = its_own or TaskManager()
        if not wanted:
            raise EvaluationError(f"No YAML file in the folder {name} describes a task.")
        if manager is its_own and name not in manager.all_tasks:
            close = nearest(name, [*manager.all_tasks, *shipped.all_tasks, "answers", "humaneval"])
            raise EvaluationError(
                f"There is no task {name}{f'; did you mean {close}?' if close else '.'} Name one "
                "of arithmetic, answers, humaneval, one that `lm-eval ls tasks` lists, a YAML file "
                "or a folder of these."
            )
        try:
            with quiet():
                loaded = manager.load(wanted)["tasks"]
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            raise EvaluationError(
                f"The task {name} cannot be loaded ({type(error).__name__}: {text}). The data of "
                "most tasks come from the Hub; a task file of your own can name local files."
            ) from None
        if twice := sorted(found.keys() & loaded):
            raise EvaluationError(
                f"{name}: a task called {twice[0]} was named before. Give one of them another name."
            )
        found |= loaded
    for name, task in found.items():
        if not isinstance(task, Task) or getattr(task, "UNSAFE_CODE", False):
            raise EvaluationError(
                f"The task {name} runs code that models write, outside the sandbox. Of such tasks "
                "only humaneval is run here."
            )
    return list(found.values())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's bars and its log, which say much of little, off the screen."""
    logger, data_logger = logging.getLogger("lm_eval"), logging.getLogger("datasets")
    before = logger.level, data_logger.level
    logger.setLevel(logging.ERROR)
    data_logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before[0])
        data_logger.setLevel(before[1])
