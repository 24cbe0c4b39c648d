"""Stop strings: where a response's text first contains one of them, and what is shown of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Text = Callable[[Sequence[int]], str]
"""From token ids to text, special tokens left out."""
UNFINISHED = "\ufffd"
"""What the bytes of a character read as until its last one is there."""


def stop_length(
    tokens: Sequence[int], seen: int, stops: Sequence[str], least: int, text: Text
) -> int | None:
    """How many tokens a response has when the first of its stop strings is complete.

    A token is never cut: the response ends with the one that completes the stop string.

    Args:
        seen: this many tokens have been looked at before.
        least: no stop string ends a response before it has this many tokens.

    Returns:
        `None`: it goes on.
    """
    if not stops:
        return None
    window = _window(stops)
    for n in range(max(seen, 0) + 1, len(tokens) + 1):
        if n >= least:
            tail = text(tokens[max(0, n - window) : n])
            if any(stop in tail for stop in stops):
                return n
    return None


def shown_text(tokens: Sequence[int], stops: Sequence[str], text: Text) -> str:
    """Text of a finished response, without the stop string that ended it and what comes after."""
    whole = text(tokens)
    if not stops:
        return whole
    tail = text(tokens[-_window(stops) :])
    found = [tail.index(stop) for stop in stops if stop in tail]
    return whole[: len(whole) - (len(tail) - min(found))] if found else whole


def settled_text(tokens: Sequence[int], stops: Sequence[str], text: Text) -> str:
    """The start of an unfinished response's text that no further token can change or take back.

    Held back are the bytes of an unfinished character, and what may become a stop string.
    """
    whole = text(tokens).rstrip(UNFINISHED)
    if not stops:
        return whole
    tail = text(tokens[-_window(stops) :]).rstrip(UNFINISHED)
    held = max(_held(tail, stop) for stop in stops)
    return whole[: len(whole) - held]


def _held(tail: str, stop: str) -> int:
    """Characters at the end of `tail` that are a stop string and what follows it, or begin one."""
    if stop in tail:
        return len(tail) - tail.index(stop)
    return next((n for n in range(len(stop) - 1, 0, -1) if tail.endswith(stop[:n])), 0)


def _window(stops: Sequence[str]) -> int:
    """The last tokens that hold the longest stop string, wherever it begins.

    Every token of text has a byte or more, a character at most four.
    """
    return 4 * max(map(len, stops)) + 4
