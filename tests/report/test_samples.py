"""Which samples the page shows."""

from __future__ import annotations

import pytest

from opd_jax.report.samples import pick_examples


def answered(verdicts):
    """Samples of a checkpoint from a string of `+` (right), `-` (wrong) and `?` (not graded)."""
    marks = {"+": True, "-": False, "?": None}
    return [
        {"prompt": f"p{i}", "response": "r", "answer": "a", "correct": marks[mark]}
        for i, mark in enumerate(verdicts)
    ]


CASES = [
    # SFT wrong and OPD right first, then one that OPD got wrong.
    ("++-+-+-+-", "+++++-+++", ["p2", "p4", "p6", "p5"]),
    # Without a failure all four are gains.
    ("++-+-+-+-", "+++++++++", ["p2", "p4", "p6", "p8"]),
    # Few gains: what SFT alone got right, then any.
    ("++-++++", "+++-+-+", ["p2", "p3", "p5", "p0"]),
    ("++++++", "++++++", ["p0", "p1", "p2", "p3"]),
    ("??????", "??????", ["p0", "p1", "p2", "p3"]),
]


@pytest.mark.parametrize(("sft", "opd", "expected"), CASES)
def test_a_difference_comes_first(sft, opd, expected):
    samples = {"opd": answered(opd), "sft": answered(sft), "base": answered("-" * len(sft))}
    examples, _ = pick_examples(samples)
    assert [example.prompt for example in examples] == expected


def test_it_is_said_how_they_were_picked():
    _, how = pick_examples({"sft": answered("+--+-"), "opd": answered("+++--")})
    assert "sft is wrong and opd right on 2 of them" in how
    assert "opd is wrong on 2 (one is shown)" in how
    assert "first 5 prompts" in how


def test_checkpoints_that_disagree_come_before_the_rest():
    samples = {"sft": answered("+++++"), "opd": answered("+++++"), "opd_topk": answered("++++-")}
    examples, _ = pick_examples(samples)
    assert [example.prompt for example in examples] == ["p4", "p0", "p1", "p2"]


def test_without_training_there_is_nothing_to_compare():
    examples, how = pick_examples({"base": answered("??????")})
    assert [example.prompt for example in examples] == ["p0", "p1", "p2", "p3"]
    assert how == "The first of 6 prompts."
    ungraded = {"sft": answered("?????"), "opd": answered("?????")}
    assert pick_examples(ungraded)[1] == "The first of 5 prompts."
    assert pick_examples({}) == ([], "The first of 0 prompts.")
