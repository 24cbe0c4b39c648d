"""Stop strings: where a response's text first contains one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Text = Callable[[Sequence[int]], str]
"""From token ids to text, special tokens left out."""


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
    # Every token of text has a byte or more, a character at most four.
    window = 4 * max(map(len, stops)) + 4
    for n in range(max(seen, 0) + 1, len(tokens) + 1):
        if n >= least:
            tail = text(tokens[max(0, n - window) : n])
            if any(stop in tail for stop in stops):
                return n
    return None
