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

    A token is never cut: the response ends with the one that completes the stop string. One that
    is complete before the response has `least` tokens is text like any other.

    Args:
        seen: this many tokens have been looked at before.
        least: no stop string ends a response before it has this many tokens.

    Returns:
        `None`: it goes on.
    """
    if not stops:
        return None
    window = _window(stops)
    for n in range(max(seen, least - 1, 0) + 1, len(tokens) + 1):
        if _completed(tokens[max(0, n - window) : n], stops, text):  # not of all before it
            return n
    return None


def shown_text(tokens: Sequence[int], stops: Sequence[str], text: Text) -> str:
    """Text of a finished response, without the stop string that ended it and what comes after."""
    whole = text(tokens)
    return whole[: len(whole) - _completed(tokens, stops, text)] if stops else whole


def settled_text(tokens: Sequence[int], stops: Sequence[str], text: Text) -> str:
    """The start of an unfinished response's text that no further token can change or take back.

    Held back are the bytes of an unfinished character, and what may become a stop string.
    """
    whole = text(tokens).rstrip(UNFINISHED)
    if not stops:
        return whole
    tail = text(tokens[-_window(stops) :]).rstrip(UNFINISHED)
    begun = max(_begun(tail, stop) for stop in stops)
    return whole[: len(whole) - max(begun, _completed(tokens, stops, text))]


def _completed(tokens: Sequence[int], stops: Sequence[str], text: Text) -> int:
    """Characters from the first stop string that the last token completes to the end; 0: none."""
    last = tokens[-_window(stops) :]
    tail, before = text(last), text(last[:-1]).rstrip(UNFINISHED)
    starts = [tail.find(stop, max(len(before) - len(stop) + 1, 0)) for stop in stops]
    return max((len(tail) - start for start in starts if start >= 0), default=0)


def _begun(tail: str, stop: str) -> int:
    """Characters at the end of `tail` that begin a stop string."""
    return next((n for n in range(len(stop) - 1, 0, -1) if tail.endswith(stop[:n])), 0)


def _window(stops: Sequence[str]) -> int:
    """The last tokens that hold the longest stop string, wherever it begins.

    Every token of text has a byte or more, a character at most four.
    """
    return 4 * max(map(len, stops)) + 4
