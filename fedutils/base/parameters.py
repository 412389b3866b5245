"""One field a parameter: type, default, meaning, allowed values, and whether it names a run.

Each room declares its own in a frozen dataclass that derives from `Parameters`; `Settings` inherits
them all. What checks a value, converts text, prints the list and names a run reads these fields.
"""

import ast
import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Parameters:
    """What the parameters of every room derive from; in use they are always the whole Settings."""

    def check(self) -> None:
        """Raise InputError where values that are allowed each do not go together."""


def parameter(
    default: Any,
    meaning: str,
    *,
    allowed: Sequence[str] = (),
    parts: Sequence[str] = (),
    bounds: tuple[float, float] = (-math.inf, math.inf),
    pattern: str = "",
    only: str = "",
    identity: bool = True,
    profiles: tuple[Any, Any] | None = None,
) -> Any:
    """Declare a parameter; its type is that of the default.

    `allowed` are all its values, `parts` those of a list with commas, `bounds` the ends; `pattern`
    says what is expected, then a regular expression. It means something `only` beside another's
    value, such as "dp=patient". A change is another run if `identity`. Left empty, it takes the
    value of `profiles`: of the demo, and of Kaggle.
    """
    return dataclasses.field(default=default, metadata=locals())


def assigned(*sources: str) -> list[str]:
    """Return the names that pieces of code assign."""
    nodes = ast.walk(ast.parse("\n".join(sources)))
    return [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def split_list(text: str) -> list[str]:
    """Split a list with commas, such as "layer4,fc"."""
    return [part.strip() for part in text.split(",")]


def convert(field: dataclasses.Field, value: Any) -> Any:
    """Convert a value, maybe text from the command line, to its parameter's type, or InputError."""
    name, kind = field.name, type(field.default)
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise InputError(f"{name}={value!r}: expected true or false")
        return str(value).lower() == "true"
    try:
        if (kind is int and isinstance(value, float)) or isinstance(value, bool):
            raise TypeError
        return kind(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={value!r}: expected {kind.__name__}") from error


def convert_given(field: dataclasses.Field, value: Any) -> Any:
    """Convert a value as `convert` does; InputError, too, for a 0 that stands for the profile's."""
    found, profiles = convert(field, value), field.metadata["profiles"]
    if profiles and isinstance(found, int | float) and not found:
        left = f"left out it is {profiles[0]} in the demo, {profiles[1]} on Kaggle"
        raise InputError(f"{field.name}={value}: give a number above 0; {left}")
    return found


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raise InputError, which names the parameter, for a value that is not allowed."""
    about, said = field.metadata, f"{field.name}={value!r}"
    if about["allowed"] and value not in about["allowed"]:
        raise InputError(f"{said}: allowed are {', '.join(about['allowed'])}")
    if about["parts"] and not set(split_list(value)) <= set(about["parts"]):
        raise InputError(f"{said}: allowed are {', '.join(about['parts'])}")
    low, high = about["bounds"]
    number = type(field.default) in (int, float)
    if number and not (low <= value <= high and math.isfinite(value)):
        finite = ", and finite" if math.isinf(high) else ""
        raise InputError(f"{said}: allowed is {low:g} to {high:g}{finite}")
    expected, _, pattern = about["pattern"].partition(": ")
    if pattern and not re.fullmatch(pattern, value):
        raise InputError(f"{said}: expected {expected}")


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raise InputError for an unknown parameter, with the known one that is nearest in spelling."""
    for name in [name for name in names if name not in known]:
        words = [one for one in known if {*name.split("_")} & {*one.split("_")} - {"dir"}]
        near = difflib.get_close_matches(name, words or list(known), n=1, cutoff=0.65)
        hint = f"did you mean {near[0]}?" if near else "`python -m fedutils parameters` lists all"
        raise InputError(f"unknown parameter {name!r}; {hint}")


def check_meant(
    fields: Mapping[str, dataclasses.Field],
    given: Mapping[str, Any],
    chosen: Parameters,
    usual: Parameters,
) -> None:
    """Raise InputError for a parameter that was given and means nothing beside those `chosen`.

    Its default passes, and what that becomes: its value among the `usual` ones.
    """
    for name, value in given.items():
        key, _, values = fields[name].metadata["only"].partition("=")
        meant = not key or {*values.split("|")} & {*split_list(str(getattr(chosen, key)))}
        if not meant and value not in (fields[name].default, getattr(usual, name)):
            has = f"{key}={getattr(chosen, key)!r}"
            raise InputError(f"{name}={value!r} means nothing with {has}: it wants {key}={values}")


def describe(field: dataclasses.Field) -> str:
    """Say in a line what a parameter means, its default, and what it may be."""
    about = field.metadata
    values = ", ".join(about["allowed"] or about["parts"])
    low, high = about["bounds"]
    if math.isfinite(low):
        values = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
    profiles = about["profiles"]
    default = f"{profiles[0]} in the demo, {profiles[1]} on Kaggle" if profiles else field.default
    default = repr(default) if default == "" else default
    values += f"{'; ' * bool(values)}only with {about['only']}" if about["only"] else ""
    same = "" if about["identity"] else "; a change continues the run"
    return f"{about['meaning']} [{default}{f'; {values}' if values else ''}{same}]"


def list_parameters(rooms: Iterable[type[Parameters]]) -> str:
    """Return a line for each parameter, under the room that declares it and its purpose."""
    lines = []
    for room in rooms:
        lines += ["", f"{room.__module__}: {room.__doc__}"]
        lines += [f"  {f.name:<17} {describe(f)}" for f in dataclasses.fields(room)]
    return "\n".join(lines[1:])
