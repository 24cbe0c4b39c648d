"""The paper's condition: the teacher that wrote the SFT answers scores the rollouts.

Scored by another teacher, the gradient carries a bias that no amount of training removes
(arXiv 2604.13010). Everything that could break the chain is compared by fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_jax.core.lineage import Identity, shown
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.data.tokenizer_probe import first_difference
from opd_jax.errors import ConsistencyError

PAPER = (
    "the paper measured 63.1 instead of 69.9 on AIME 2024 when another teacher scored, online "
    "64.8 instead of 68.5 (8B student)"
)
SHARE = (
    "teacher and student must share one tokenizer: if their vocabularies are the same, copy "
    "tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json of the "
    "one that is right to the other"
)


def recorded(meta: Mapping[str, Any], key: str, where: str, stage: str) -> Identity:
    """The model that is recorded under a key of an artefact's lineage.

    Args:
        where: the artefact's file.
        stage: what writes it.

    Raises:
        ConsistencyError: nothing readable is recorded there.
    """
    try:
        return Identity.from_json(meta[key])
    except (KeyError, TypeError, AttributeError):
        raise ConsistencyError(
            f"missing lineage: {where} records no readable '{key}', so nothing says by whom it is; "
            f"redo it with --force {stage}"
        ) from None


def check_teacher(
    wrote: Identity, wrote_in: str, scored: Identity, scored_in: str, *, allow: bool
) -> list[str]:
    """What differs between the two teachers, where that is allowed.

    Args:
        wrote: the teacher of the SFT answers, as recorded in `wrote_in`.
        scored: the teacher of the scores, as recorded in `scored_in`.

    Raises:
        ConsistencyError: they differ and `allow` is false.
    """
    if wrote.fingerprint == scored.fingerprint:
        return []
    differing = wrote.differences(scored)
    if allow:
        return differing
    raise ConsistencyError(
        f"teacher mismatch: the SFT answers are by {wrote} (recorded in {wrote_in}), the scores "
        f"by {scored} (recorded in {scored_in}); they differ in {_listed(differing)}; {PAPER}; "
        f"score again with the first teacher (model.teacher={wrote.name} --force score), or go on "
        "with teacher.allow_mismatch=true, which marks the run and its exports"
    )


def mismatch_note(wrote: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    """The mark of a model that was trained although the teachers differ, in one sentence.

    Args:
        wrote: the teacher of the SFT answers, as lineage records it.
        lineage: of the trained model: `teacher`, and `teachers_differ_in`, which older ones lack.
    """
    parts = lineage.get("teachers_differ_in")
    return (
        f"the scoring teacher, {shown(lineage['teacher'])}, is not the one that wrote the SFT "
        f"answers, {shown(wrote)}{f': they differ in {_listed(parts)}' if parts else ''}; the "
        f"gradient carries a bias that training cannot remove: {PAPER} (arXiv 2604.13010)"
    )


def check_same_model(
    expected: Identity, found: Identity, what: str, where: str, stage: str
) -> None:
    """Raises ConsistencyError unless both are the same model.

    Args:
        what: the found one's part in `where`, which `stage` writes.
    """
    if expected.fingerprint != found.fingerprint:
        raise ConsistencyError(
            f"{what} recorded in {where} is {found}, expected {expected}; they differ in "
            f"{_listed(expected.differences(found))}; redo it with --force {stage}"
        )


def check_same_tokenizer(first: Identity, second: Identity) -> None:
    """Raises ConsistencyError unless ids mean the same text, ends included, for both models.

    From what is recorded of them. Parts that render and cut alike are alike; of models recorded
    without parts the whole has to be the same.
    """
    if first.tokenizer == second.tokenizer:
        return
    if first.parts is not None and second.parts is not None:
        differing = first.parts.differences(second.parts)
    else:
        differing = first.tokenizer_differences(second)
    if differing:
        raise ConsistencyError(
            f"tokenizer mismatch: {first} and {second} differ in {_listed(differing)}; {SHARE}"
        )


def check_tokenizers(first: Tokenizer, second: Tokenizer) -> None:
    """Raises ConsistencyError, with the first difference, unless both give a model the same."""
    difference = first_difference(first, second)
    if difference is not None:
        raise ConsistencyError(f"tokenizer mismatch: {difference}; {SHARE}")


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
