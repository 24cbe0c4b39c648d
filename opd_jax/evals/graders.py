"""Whether a response ends in the right answer.

`exact`: the text after `</think>`, stripped, equals the answer, character by character.
`math`:  the last `\\boxed{}` of that text, or else its last number, equals the answer as an exact
         rational number (`0.5`, `1/2` and `\\frac{1}{2}` are equal, `0.333` and `1/3` are not;
         `1,000` is a thousand). It is no computer algebra: an answer without a number is compared
         as text without spaces.
`none`:  there is nothing to grade.
"""

from __future__ import annotations

import re
from fractions import Fraction

from opd_jax.errors import ConfigError, DataError

_CLOSE = "</think>"
_OPEN = "<think>"
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+"
_LATEX_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")
_NUMBER = re.compile(rf"(?<![\w.)\]])-?(?:{_UNSIGNED})(?:/\d+)?|(?:{_UNSIGNED})(?:/\d+)?")


def grade(kind: str, response_text: str, answer: str | None) -> bool:
    """Grade one response. A response whose thought was never closed has no answer and is wrong.

    Raises:
        ConfigError: unknown `kind`.
        DataError: a grader is asked for, but the prompt has no answer.
    """
    if kind not in ("none", "exact", "math"):
        raise ConfigError(f"evaluate.grader: unknown grader {kind!r}; use none, exact or math")
    if kind == "none":
        return False
    if answer is None:
        raise DataError(
            f"grader {kind!r} needs an answer with every prompt; "
            "add the key 'answer' to the prompt file or set evaluate.grader=none"
        )
    final = final_text(response_text)
    if final is None:
        return False
    if kind == "exact":
        return final == answer.strip()
    return _math_equal(final, answer.strip())


def final_text(response_text: str) -> str | None:
    """The stripped text after the last `</think>`, or None when a thought is still open."""
    rest = response_text.rpartition(_CLOSE)[2]
    return None if _OPEN in rest else rest.strip()


def _math_equal(response: str, answer: str) -> bool:
    boxed = last_boxed(response)
    given = response if boxed is None else boxed
    expected = last_number(answer)
    if expected is not None:
        return last_number(given) == expected
    return "".join(given.split()) == "".join(answer.split())


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete `\boxed{...}`, braces balanced."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    return None


def last_number(text: str) -> Fraction | None:
    """The last number of a text as an exact rational, or None."""
    plain = _LATEX_FRACTION.sub(_plain_fraction, text)
    found = _NUMBER.findall(plain)
    return _as_fraction(found[-1]) if found else None


def _plain_fraction(match: re.Match[str]) -> str:
    sign, top, bottom = match.groups()
    negative = (sign + top + bottom).count("-") % 2
    return f" {'-' * negative}{top.lstrip('-')}/{bottom.lstrip('-')} "


def _as_fraction(number: str) -> Fraction | None:
    top, _, bottom = number.replace(",", "").partition("/")
    try:
        return Fraction(top) / Fraction(bottom or "1")
    except ZeroDivisionError:
        return None
