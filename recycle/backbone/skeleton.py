"""A model from its config.json alone: every module, and parameters that take no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from recycle.disk import expand, read_json_object

from .errors import BackboneError
from .loading import BackboneConfig, check_architecture, resolve_source
from .quantization import settle_quantization, stored_quantization
from .source import CONFIG, fetched


def load_skeleton(backbone: BackboneConfig) -> tuple[PreTrainedModel, str | None]:
    """A causal LM without weights, as a recipe's section `backbone` says.

    Every parameter is one zero, shown in its full shape. Of a Hub id config.json alone is fetched.

    Returns:
        The model, and what its weights are quantised in, if they are.

    Raises:
        BackboneError: There is no config.json, or it is of no model that can be used.
    """
    source = resolve_source(backbone.id, backbone.revision)
    folder = fetched(source, backbone.revision, [CONFIG])
    path = folder / CONFIG
    if not path.is_file():
        raise BackboneError(
            f"not a model that transformers can load, it has no {CONFIG}: {source!r}. Name the "
            "folder or the Hub id of a model."
        )
    raw = read_json_object(path, BackboneError)
    name = str(folder.absolute()) if expand(source).is_dir() else source
    check_architecture(name, raw)
    quantization = settle_quantization(name, stored_quantization(raw), backbone.quantization)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # Experts are looped over: no kernel has to take parameters without memory.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, experts_implementation="eager"
            )
    except Exception as error:  # whatever a model's own code makes of numbers that do not fit
        raise BackboneError(
            f"{path} describes no model that transformers can build: {one_line(error)}. Copy or "
            "fetch it again."
        ) from None
    shown: dict[Tensor, Any] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in shown:
                zero = torch.zeros(()).expand(parameter.shape)
                shown[parameter] = nn.Parameter(zero, requires_grad=False)
            if parameter is not None:
                module._parameters[name] = shown[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return model.eval(), quantization


def one_line(error: Exception) -> str:
    """The whole of another library's message, or the error's type where it has none."""
    return " ".join((str(error) or type(error).__name__).split()).rstrip(".:")


class _ShapesAlone(TorchFunctionMode):
    """Products with matrices give zeros."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and len(args) > 1:
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Run a skeleton for the shapes in it: a pass takes milliseconds, whatever the model's size."""
    with _ShapesAlone():
        yield
