import dataclasses

import pytest

from opd_jax.core.lineage import Identity
from opd_jax.errors import ConsistencyError
from opd_jax.teacher.consistency import (
    check_same_model,
    check_same_tokenizer,
    check_teacher,
    check_vocabulary_rows,
)

FIRST = Identity("/models/first", "w1", "a1", "t1")


@pytest.mark.parametrize("part", ["weights", "architecture", "tokenizer"])
def test_a_teacher_that_differs_in_anything_is_refused_and_both_are_named(part):
    other = dataclasses.replace(FIRST, name="/models/second", **{part: "other"})
    with pytest.raises(ConsistencyError) as caught:
        check_teacher(FIRST, "sft/lineage.json", other, "the pass", allow=False)
    for words in ("/models/first", "/models/second", "sft/lineage.json", "the pass", "63.1"):
        assert words in str(caught.value)
    assert check_teacher(FIRST, "a", other, "b", allow=True) is True


def test_the_same_teacher_in_another_folder_is_the_same():
    moved = dataclasses.replace(FIRST, name="/elsewhere")
    assert check_teacher(FIRST, "a", moved, "b", allow=False) is False


def test_tokenizer_and_student_mismatches_are_refused():
    with pytest.raises(ConsistencyError, match="tokenizer mismatch: /models/first has t1"):
        check_same_tokenizer(FIRST, dataclasses.replace(FIRST, name="x", tokenizer="t2"))
    with pytest.raises(ConsistencyError, match="rollouts is by x"):
        check_same_model(
            FIRST, dataclasses.replace(FIRST, name="x", weights="w2"), "it", "rollouts"
        )


def test_a_teacher_with_more_rows_than_the_student_is_refused():
    check_vocabulary_rows(("teacher", 100), ("student", 128))
    with pytest.raises(ConsistencyError, match="teacher has 152064 embedding rows, student has 1"):
        check_vocabulary_rows(("teacher", 152064), ("student", 151936))
