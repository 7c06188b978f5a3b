"""Kinds of values in a recipe: what a text as it was written must be to become one of them.

`2e-5`, `20M`, `10k`, `1_000` and `1B` are numbers, `2,4,8` is a list, only `true` and `false` are
booleans, and `yes` is none. Python values of the right type are taken as well.
"""

import math
import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

_NUMBER = re.compile(
    r"([+-]?(?:[0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)([kKMB]?)"
)
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}


def _refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("recipe", "{message}", {"message": message})


def _decimal(text: str) -> Decimal | None:
    """`2e-5`, `20M`, `10k`, `1_000` and `1B` as exact numbers; None where the text is none."""
    match = _NUMBER.fullmatch(text)
    return Decimal(match[1].replace("_", "")) * _FACTORS[match[2]] if match else None


def _whole(value: object) -> object:
    number = _decimal(value) if isinstance(value, str) else value
    if isinstance(number, Decimal) and number == number.to_integral_value():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or abs(number) >= 2**63:
        raise _refuse("must be a whole number, such as 8, 10k, 20M or 1_000")
    return number


def _real(value: object) -> object:
    number = _decimal(value) if isinstance(value, str) else value
    number = float(number) if isinstance(number, int | float | Decimal) else None
    if isinstance(value, bool) or number is None or not math.isfinite(number):
        raise _refuse("must be a number, such as 0.1, 2e-5 or 10k")
    return number


def _flag(value: object) -> object:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise _refuse("must be true or false")
    return value


def _checkpointing(value: object) -> object:
    if value == "selective":
        return value
    try:
        return _flag(value)
    except PydanticCustomError:
        raise _refuse("must be false, true or selective") from None


def _micro_batch(value: object) -> object:
    if value == "auto":
        return value
    try:
        number = _whole(value)
    except PydanticCustomError:
        number = 0
    if isinstance(number, int) and number >= 1:
        return number
    raise _refuse("must be a whole number of 1 or more, or auto")


def _none(value: object) -> object:
    return None if value == "none" else value


def _listed(value: object) -> object:
    """`2,4,8` or `[2, 4, 8]` as a list; a single value is a list of one."""
    if not isinstance(value, str):
        return value
    inside = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return [item.strip() for item in inside.split(",")] if inside.strip() else []


def _streams(value: tuple[int, ...]) -> tuple[int, ...]:
    if not value:
        raise _refuse("must name at least one number of streams, such as 2,4,8")
    if min(value) < 2:
        raise _refuse(
            "every number of streams must be 2 or more: "
            "P = 1 is the backbone itself, is always there and needs no training"
        )
    if len(set(value)) < len(value):
        raise _refuse("must name each number of streams once")
    return tuple(sorted(value))


def _nameable(value: str) -> str:
    path = value.encode(errors="replace")
    if len(path) > 4000 or max(map(len, path.split(b"/"))) > 255:  # what a disk takes
        raise _refuse("must be shorter: a path has at most 255 bytes in a part, and 4000 in all")
    return value


def _matching(pattern: str, message: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise _refuse(message)
        return value

    return AfterValidator(check)


Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(_nameable)]  # a path, or the id of what lies on the Hub
Flag = Annotated[bool, BeforeValidator(_flag)]
Whole = Annotated[int, BeforeValidator(_whole)]
Real = Annotated[float, BeforeValidator(_real)]
Count = Annotated[Whole, Field(ge=1)]  # how many, at least one
MicroBatch = Annotated[int | Literal["auto"], BeforeValidator(_micro_batch)]
Checkpointing = Annotated[bool | Literal["selective"], BeforeValidator(_checkpointing)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
Rate = Annotated[Real, Field(gt=0)]
AtLeastTwo = Annotated[Whole, Field(ge=2)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_listed), Field(min_length=1)]
Compared = Annotated[tuple[Literal["lora"], ...], BeforeValidator(_listed)]
Quantization = Annotated[Literal["int8", "nf4", None], BeforeValidator(_none)]
Name = Annotated[
    Place,
    _matching(
        r"[a-z0-9][a-z0-9._-]*",
        "must hold a-z, 0-9, '.', '_' and '-' only and start with a letter or a digit",
    ),
]
BackboneId = Annotated[
    Place,
    _matching(r"(?!package://).+|package://[\w.]+/.+\.gguf", "must be package://PACKAGE/FILE.gguf"),
]
Streams = Annotated[tuple[Whole, ...], BeforeValidator(_listed), AfterValidator(_streams)]
