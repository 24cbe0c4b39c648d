"""Graders say right only for the right answer, wherever it stands."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.errors import ConfigError, DataError
from opd_jax.evals.graders import final_text, grade, last_boxed, last_number


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("519336", True),
        (" 519336\n", True),
        ("<think>6*6+0=36</think>519336", True),
        ("<think>a</think>x<think>b</think>519336", True),
        ("<think>519336</think>519335", False),
        ("<think>519336", False),
        ("<think>a</think>519336<think>", False),
        ("519336</think>", False),
        ("0519336", False),
        ("", False),
    ],
)
def test_exact_compares_the_text_after_the_thought(response, right):
    assert grade("exact", response, "519336") is right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("so it is 42.", "42", True),
        ("first 42, then 43", "42", False),
        (r"\boxed{42} as 6*7 has 2 factors", "42", True),
        (r"\boxed{41} no, \boxed{42}", "42", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"-\frac{3}{4}", "-0.75", True),
        ("1,000 apples", "1000", True),
        ("1e3", "1000", True),
        ("0.333", "1/3", False),
        ("x=-2", "-2", True),
        ("10-2", "2", True),
        ("7", "-7", False),
        (r"\boxed{x + 1}", "x+1", True),
        (r"\boxed{x}", "y", False),
        ("<think>42</think>I do not know", "42", False),
        ("1/0", "0", False),
    ],
)
def test_math_compares_numbers_exactly(response, answer, right):
    assert grade("math", response, answer) is right


def test_none_never_says_right_and_needs_no_answer():
    assert grade("none", "42", None) is False


def test_a_grader_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match="unknown grader 'maths'"):
        grade("maths", "1", "1")
    with pytest.raises(DataError, match="needs an answer"):
        grade("exact", "1", None)


def test_boxed_balances_braces_and_skips_unfinished_ones():
    assert last_boxed(r"\boxed{a{b}c}") == "a{b}c"
    assert last_boxed(r"\boxed{1} \boxed{2") == "1"
    assert last_boxed("1") is None


def test_final_text_is_none_while_the_thought_is_open():
    assert final_text("plain ") == "plain"
    assert final_text("<think>x") is None


@given(st.fractions(), st.text(alphabet="abc =:$", max_size=5))
def test_a_number_is_read_back_from_text(number: Fraction, before: str):
    assert last_number(f"{before} {number.numerator}/{number.denominator}.") == number


@given(st.integers(-(10**12), 10**12))
def test_thousands_separators_change_nothing(number: int):
    assert last_number(f"about {number:,} in all") == number


@given(st.text(max_size=30), st.text(max_size=10))
def test_no_text_makes_a_grader_fail(response: str, answer: str):
    for kind in ("exact", "math"):
        assert grade(kind, response, answer) in (True, False)
