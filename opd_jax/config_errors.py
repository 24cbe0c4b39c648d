"""Turn a failed validation of the config into one line: place, key, problem, value, repair."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from opd_jax.config import Config
from opd_jax.config_base import Frozen

Location = tuple[int | str, ...]

_EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text (put a number in quotes to mean text)",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list such as [a, b]",
    "dict_type": "must be a block of keys",
    "model_type": "must be a block of keys",
}


def describe(
    error: ValidationError,
    file: str,
    origins: Mapping[tuple[str, ...], str],
    root: type[Frozen] = Config,
) -> str:
    """One line for the first problem.

    Args:
        file: where the values come from.
        origins: the override behind each overridden key.
        root: the class that was validated.
    """
    problems = error.errors()
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    source = _source(first, file, origins)
    return f"{source}: {_problem(first, root)}{more}".replace("\n", " ")


def block_at(block: type[Frozen], key: int | str, entry: bool = False) -> type[Frozen] | None:
    """The config class of a field, or with `entry` that of a mapping field's values; else None."""
    field = block.model_fields.get(str(key))
    kind = field.annotation if field else None
    if entry:
        kind = get_args(kind)[1] if get_origin(kind) is dict else None
    elif get_origin(kind) is UnionType:  # `Block | None`
        kind = get_args(kind)[0]
    return kind if isinstance(kind, type) and issubclass(kind, Frozen) else None


def _source(problem: ErrorDetails, file: str, origins: Mapping[tuple[str, ...], str]) -> str:
    """The last override at, above or below the place, else the file.

    What is said of a whole block is about several of its keys: then it is the override of the key
    that the message names first, or that of the block itself.
    """
    place = tuple(map(str, problem["loc"]))
    latest = list(origins.items())[::-1]
    if problem["type"] != "value_error":
        return next((text for keys, text in latest if _on_one_path(keys, place)), file)
    inside = [(keys[len(place) :], text) for keys, text in latest if keys[: len(place)] == place]
    for name in re.findall(r"[\w-]+(?:\.[\w-]+)*", problem["msg"]):
        for keys, text in inside:
            if _on_one_path(keys, tuple(name.split("."))):
                return text
    return next((text for keys, text in latest if keys == place[: len(keys)]), file)


def _on_one_path(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    depth = min(len(one), len(other))
    return depth > 0 and one[:depth] == other[:depth]


def _problem(problem: ErrorDetails, root: type[Frozen]) -> str:
    loc, kind, value = problem["loc"], problem["type"], problem["input"]
    dotted = _dotted(loc)
    if kind == "extra_forbidden":
        *parents, key = loc
        parent = f"{_dotted(tuple(parents))}: " if parents else ""
        return f"{parent}unknown key '{key}'; {_unknown_hint(loc, root)}"
    if kind == "missing":
        return f"{dotted}: missing; add it to the file or give {dotted}=VALUE"
    if kind == "value_error":
        text = problem["msg"].removeprefix("Value error, ")
        return f"{dotted}.{text}" if dotted else text
    text = _EXPECTED.get(kind) or problem["msg"].replace("Input should", "must")
    return f"{dotted}: {text}, but is {value!r:.80}{_choice_hint(problem)}"


def _dotted(loc: Location) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".").removesuffix(".[key]")


def _choice_hint(problem: ErrorDetails) -> str:
    if problem["type"] != "literal_error":
        return ""
    choices = str(problem.get("ctx", {}).get("expected", "")).replace(" or ", ", ").split(", ")
    close = difflib.get_close_matches(repr(problem["input"]), choices, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown_hint(loc: Location, root: type[Frozen]) -> str:
    """The key that was meant: one beside it that reads alike, the same one elsewhere, or any."""
    siblings = _siblings(loc[:-1], root)
    key = str(loc[-1])
    if close := difflib.get_close_matches(key, siblings, 1):
        return f"did you mean '{close[0]}'?"
    if elsewhere := [dotted for dotted in _all_keys(root) if dotted.endswith(f".{key}")]:
        meant = "' or '".join(elsewhere[:4])
        return f"did you mean '{meant}'?"
    return f"the keys here are {', '.join(siblings)}"


def _siblings(loc: Location, root: type[Frozen]) -> list[str]:
    """The keys of the block at `loc`; after a mapping field comes the name of an entry."""
    block = root
    entry: type[Frozen] | None = None
    for key in loc:
        if entry is not None:
            block, entry = entry, None
            continue
        entry = block_at(block, key, entry=True)
        block = block_at(block, key) or block
    return list(block.model_fields)


def _all_keys(block: type[Frozen], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree; the entries of a mapping are written NAME."""
    for key in block.model_fields:
        if inner := block_at(block, key):
            yield from _all_keys(inner, f"{prefix}{key}.")
        elif inner := block_at(block, key, entry=True):
            yield from _all_keys(inner, f"{prefix}{key}.NAME.")
        else:
            yield f"{prefix}{key}"
