"""Types for the content of YAML and JSON files (plans, protocols, tables, run cards, ...), checked by pydantic.

Values are not converted: "3" is not 3, true is not 1, NaN is not a number. An unknown name is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ldm.io.errors import did_you_mean, shown

T = TypeVar("T")


def _quoted(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"should be a text: in YAML off, on, yes and no need quotes; got {value}")
    return value


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), BeforeValidator(_quoted)]
Number = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[Number, Field(ge=0)]
AboveZero = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**32)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Schema(BaseModel):
    """Base class: its fields are the names that a mapping in a file may have. Instances are immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_known_names(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and cls.model_config["extra"] == "forbid":
            check_names(content, cls.model_fields)
        return content


def check_names(names: Iterable[Any], accepted: Iterable[str]) -> None:
    """Raises ValueError for names that are not accepted."""
    accepted = list(accepted)
    if unknown := sorted({*map(str, names)} - {*accepted}):
        raise ValueError(
            f"has {', '.join(map(shown, unknown))}; accepted: {', '.join(accepted)}{did_you_mean(unknown[0], accepted)}"
        )


def parse(kind: type[T], content: Any, place: str = "") -> T:
    """The content of a file as a `Schema`, or as another type that pydantic knows.

    Args:
        place: where the content stands, for messages.

    Raises:
        ValueError: a wrong value; the message is one line that names the first one.
    """
    try:
        return TypeAdapter(kind).validate_python(content, strict=True)
    except ValidationError as error:
        raise ValueError(first_error(error, place)) from None


def first_error(error: ValidationError, place: str = "") -> str:
    """The first of pydantic's errors in one line: the name, what is accepted, what was given."""
    found = error.errors(include_url=False)[0]
    name = ".".join(filter(None, [place, *map(str, found["loc"])]))
    if found["type"] == "value_error":
        return f"{name} {found['ctx']['error']}".strip()
    if found["type"] == "missing":
        return f"{name} is missing"
    if found["type"] == "extra_forbidden":
        return f"{name} is not a name that is accepted here"
    mapping = found["type"] in ("model_type", "dict_type")
    wanted = "be a mapping" if mapping else found["msg"].partition(" should ")[2]
    problem = f" should {wanted}" if wanted else f": {found['msg']}"
    return f"{name or 'it'}{problem}; got {shown(found['input'])}"
