import dataclasses

import pytest
from tiny_tokenizers import MERGES, TEMPLATE, tokens, write_tokenizer

from opd_jax.core.lineage import Identity, TokenizerParts
from opd_jax.data.tokenizer import load_tokenizer
from opd_jax.data.tokenizer_probe import parts_of
from opd_jax.errors import ConsistencyError
from opd_jax.teacher.consistency import (
    check_same_model,
    check_same_tokenizer,
    check_teacher,
    check_tokenizers,
    mismatch_note,
    recorded,
)

PARTS = TokenizerParts("v", "x", "c", "r", "e")
FIRST = Identity("/models/first", "w1", "a1", "t1", PARTS)


def other(**changes):
    return dataclasses.replace(FIRST, name="/models/second", **changes)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"weights": "w2"}, "weights"),
        ({"architecture": "a2"}, "config"),
        ({"vocabulary": "v2"}, "tokenizer (vocabulary, merges or special tokens)"),
        ({"texts": "x2"}, "tokenizer (how text is cut into tokens)"),
        ({"chat_template": "c2", "chats": "r2"}, "chat template"),
        ({"chat_template": "c2"}, "chat template (its text alone)"),
        ({"end_tokens": "e2"}, "end tokens"),
        ({}, "tokenizer files"),
        (
            {"weights": "w2", "architecture": "a2", "end_tokens": "e2"},
            "weights, config and end tok",
        ),
    ],
)
def test_a_teacher_that_differs_in_anything_is_refused_and_both_are_named(changes, differing):
    parts = {key: x for key, x in changes.items() if key in PARTS.__dataclass_fields__}
    whole = {key: x for key, x in changes.items() if key not in parts}
    if parts or not whole:
        whole |= {"tokenizer": "t2", "parts": dataclasses.replace(PARTS, **parts)}
    second = other(**whole)
    with pytest.raises(ConsistencyError) as caught:
        check_teacher(FIRST, "sft/lineage.json", second, "the pass", allow=False)
    assert str(caught.value).startswith(
        f"teacher mismatch: the SFT answers are by {FIRST} (recorded in sft/lineage.json), the "
        f"scores by {second} (recorded in the pass); they differ in {differing}"
    )
    assert "the paper measured 63.1 instead of 69.9 on AIME 2024" in str(caught.value)
    assert "model.teacher=/models/first --force score" in str(caught.value)
    assert check_teacher(FIRST, "a", second, "b", allow=True)


def test_the_same_teacher_in_another_folder_is_the_same():
    assert check_teacher(FIRST, "a", other(), "b", allow=False) == []


def test_what_was_recorded_without_parts_is_compared_as_a_whole():
    old = Identity.from_json({**FIRST.to_json(), "parts": None})
    older = Identity.from_json({k: v for k, v in FIRST.to_json().items() if k != "parts"})
    assert old == older
    assert check_teacher(old, "a", FIRST, "b", allow=False) == []
    check_same_tokenizer(old, FIRST)
    with pytest.raises(ConsistencyError, match="differ in tokenizer, chat template or end tokens"):
        check_same_tokenizer(old, other(tokenizer="t2"))


def test_recorded_tokenizers_that_feed_a_model_alike_are_the_same():
    commented = dataclasses.replace(PARTS, chat_template="c2")
    check_same_tokenizer(FIRST, other(tokenizer="t2", parts=commented))
    rendered = dataclasses.replace(commented, chats="r2")
    with pytest.raises(ConsistencyError, match=r"/models/second \(.*\) differ in chat template; t"):
        check_same_tokenizer(FIRST, other(tokenizer="t2", parts=rendered))


def test_another_student_than_the_one_that_sampled_is_refused():
    with pytest.raises(ConsistencyError) as caught:
        check_same_model(FIRST, other(weights="w2"), "the student", "rollouts", "rollout")
    assert "the student recorded in rollouts is /models/second" in str(caught.value)
    assert "they differ in weights; redo it with --force rollout" in str(caught.value)


@pytest.mark.parametrize("meta", [{}, {"teacher": None}, {"teacher": {"name": "x"}}])
def test_missing_lineage_is_refused(meta):
    with pytest.raises(ConsistencyError, match=r"pass.json records no readable 'teacher'.*e score"):
        recorded(meta, "teacher", "pass.json", "score")


def test_the_note_of_a_mismatch_says_who_and_what():
    lineage = {"teacher": FIRST.to_json(), "teachers_differ_in": ["weights", "config"]}
    note = mismatch_note(other(weights="w2").to_json(), lineage)
    for words in ("/models/first (", "/models/second (", "weights and config;", "63.1", "68.5"):
        assert words in note
    assert "differ in" not in mismatch_note(FIRST.to_json(), {"teacher": FIRST.to_json()})


END, STOP = tokens().index("<|end|>"), tokens().index("<|stop|>")
SWAPPED = [MERGES[1], MERGES[0], *MERGES[2:]]
FEWER = [merge for merge in MERGES if merge != ("Ġ", "Ġ")]


@pytest.mark.parametrize(
    ("change", "words", "differing"),
    [
        ({"merges": FEWER}, r"the text .* becomes \[", "merges"),
        ({"merges": SWAPPED}, r"merge 0 is \['h', 'e'\] in /.*/a and \['l', 'l'\] in /", "merges"),
        ({"template": TEMPLATE + " "}, r"the chat template renders \.\.\.'", "chat template"),
        (
            {"generation": {"eos_token_id": STOP}},
            rf"the end tokens are '<\|end\|>' \({END}\) in /.*/a and '<\|end\|>' \({END}\), '<\|st",
            "end tokens",
        ),
    ],
    ids=["one merge less", "two merges swapped", "template", "end token"],
)
def test_tokenizers_that_differ_are_refused_with_the_first_difference(
    tmp_path, change, words, differing
):
    first = load_tokenizer(write_tokenizer(tmp_path / "a"))
    second = load_tokenizer(write_tokenizer(tmp_path / "b", **change))
    with pytest.raises(ConsistencyError, match=f"tokenizer mismatch: {words}") as caught:
        check_tokenizers(first, second)
    print(caught.value)
    assert "teacher and student must share one tokenizer" in str(caught.value)
    found = parts_of(first).differences(parts_of(second))
    assert any(differing in part for part in found)


def test_tokenizers_whose_files_alone_differ_are_the_same(tmp_path):
    first = load_tokenizer(write_tokenizer(tmp_path / "a"))
    second = load_tokenizer(write_tokenizer(tmp_path / "b", template="{# hello #}" + TEMPLATE))
    assert first.fingerprint != second.fingerprint
    check_tokenizers(first, second)
    assert parts_of(first).differences(parts_of(second)) == []
    assert parts_of(first).chat_template != parts_of(second).chat_template
