"""Prompts: JSON lines of `{"id", "prompt" or "messages", "answer"?}`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_jax.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """A conversation that a model is to go on, and the answer a grader compares with."""

    id: str
    messages: tuple[dict[str, str], ...]
    answer: str | None = None

    def text(self) -> str:
        """For people: what the user said; of a longer conversation every message with its role."""
        if len(self.messages) == 1 and self.messages[0]["role"] == "user":
            return self.messages[0]["content"]
        return "\n\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


def load_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, in its order; with a limit only that many are read.

    A line's other keys are for its author and are not read.

    Raises:
        DataError: no such file, no prompts in it, a broken or incomplete line, an id used twice.
    """
    path = Path(path)
    prompts: dict[str, Prompt] = {}
    line_of: dict[str, int] = {}
    for number, line in _lines(path):
        if limit is not None and len(prompts) == limit:
            break
        prompt = _parse(line, f"{path}:{number}")
        if prompt.id in prompts:
            raise DataError(
                f"{path}:{number}: id {prompt.id!r} is already used on line {line_of[prompt.id]}; "
                "give every prompt its own id"
            )
        prompts[prompt.id], line_of[prompt.id] = prompt, number
    if not prompts:
        raise DataError(f"{path}: holds no prompts; write one JSON object per line")
    return list(prompts.values())


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank."""
    if not path.is_file():
        raise DataError(f"{path}: no such prompt file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _parse(line: bytes, where: str) -> Prompt:
    try:
        row = json.loads(line.decode("utf-8"))
        # JSON can escape half a surrogate pair, which is no text in any encoding.
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {error.object[error.start]!r} is half of a surrogate pair; write the whole "
            "character"
        ) from error
    except ValueError as error:
        raise DataError(f"{where}: not a line of JSON ({error}); one object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds {type(row).__name__}, not a JSON object")
    name, answer = row.get("id"), row.get("answer")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise DataError(f"{where}: id={name!r}; every prompt needs an id, a string or an integer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise DataError(f"{where}: answer={answer!r} is no text and no number; put it in quotes")
    return Prompt(str(name), _messages(row, where), None if answer is None else str(answer))


def _messages(row: dict[str, Any], where: str) -> tuple[dict[str, str], ...]:
    if ("prompt" in row) == ("messages" in row):
        raise DataError(f"{where}: needs either 'prompt' or 'messages', exactly one of them")
    if "prompt" in row:
        content = row["prompt"]
        messages = [{"role": "user", "content": content}]
    else:
        messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(
            f"{where}: 'prompt' must be a string, 'messages' a list of objects with the strings "
            "'role' and 'content'"
        )
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last message is the assistant's; end with the user's")
    return tuple(messages)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
