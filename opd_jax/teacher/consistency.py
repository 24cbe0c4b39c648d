"""The paper's condition: the teacher that wrote the SFT answers scores the rollouts.

Scored by another teacher, the gradient carries a bias that no amount of training removes
(arXiv 2604.13010). Everything that could break the chain is compared by fingerprint.
"""

from __future__ import annotations

from opd_jax.core.lineage import Identity
from opd_jax.errors import ConsistencyError

PAPER = "the paper measured 63.1 instead of 69.9 on AIME 2024 (8B) when another teacher scored"


def check_teacher(
    wrote: Identity, wrote_in: str, scored: Identity, scored_in: str, *, allow: bool
) -> bool:
    """Whether the two teachers differ, where that is allowed.

    Args:
        wrote: the teacher of the SFT answers, as recorded in `wrote_in`.
        scored: the teacher of the scores, as recorded in `scored_in`.

    Raises:
        ConsistencyError: they differ and `allow` is false.
    """
    if wrote.fingerprint == scored.fingerprint:
        return False
    if allow:
        return True
    raise ConsistencyError(
        f"teacher mismatch: the SFT answers are by {wrote} (recorded in {wrote_in}), the scores "
        f"by {scored} (recorded in {scored_in}); {PAPER}; score again with the first teacher "
        "(--force score), or go on with teacher.allow_mismatch=true"
    )


def check_same_model(expected: Identity, found: Identity, what: str, where: str) -> None:
    """Raises ConsistencyError unless both are the same model."""
    if expected.fingerprint != found.fingerprint:
        raise ConsistencyError(
            f"{what} in {where} is by {found}, expected {expected}; redo that stage with --force"
        )


def check_same_tokenizer(first: Identity, second: Identity) -> None:
    """Raises ConsistencyError unless ids mean the same text, ends included, for both models."""
    if first.tokenizer != second.tokenizer:
        raise ConsistencyError(
            f"tokenizer mismatch: {first.name} has {first.tokenizer[:12]}, {second.name} has "
            f"{second.tokenizer[:12]} (vocabulary, chat template or end tokens differ); "
            "teacher and student must share one tokenizer: copy the tokenizer files of one to the "
            "other if their vocabularies are the same"
        )


def check_vocabulary_rows(teacher: tuple[str, int], student: tuple[str, int]) -> None:
    """Raises ConsistencyError if the teacher can name a token that the student has no row for.

    Args:
        teacher: name and embedding rows.
        student: likewise; more rows than the teacher's only pad the vocabulary.
    """
    if teacher[1] > student[1]:
        raise ConsistencyError(
            f"vocabulary mismatch: {teacher[0]} has {teacher[1]} embedding rows, {student[0]} has "
            f"{student[1]}; cut the teacher's padding rows, or pad the student's to as many"
        )
