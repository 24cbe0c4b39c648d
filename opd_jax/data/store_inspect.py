"""What a store holds, in figures: for people who look at it, frozen or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_jax.data.records import Record, Scores
from opd_jax.data.store import Store
from opd_jax.data.store_files import StoreFiles
from opd_jax.data.store_layout import StoreLayout, look
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import RecordView, Snapshot

SAMPLE = 4096
"""Mean log-probs are of at most so many records, evenly spaced: a large store is not read whole."""
SHOWN = 3
_TOGETHER = 256


@dataclass(frozen=True)
class PassFacts:
    """One teacher pass.

    Attributes:
        scored: how many of the committed records have scores.
        coverage: by snapshot's hash, how many of its records have scores, and how many it has.
        sampled: how many records the means are of.
        teacher_mean: mean log-prob per response token under the teacher, nats; NaN without tokens.
        student_mean: of the same tokens under the model that drew them.
    """

    name: str
    meta: dict[str, Any]
    scored: int
    coverage: dict[str, tuple[int, int]]
    sampled: int
    teacher_mean: float
    student_mean: float


@dataclass(frozen=True)
class Example:
    """A record with what each pass says of it."""

    record: Record
    scores: dict[str, Scores]


@dataclass(frozen=True)
class StoreFacts:
    """All that is shown of a store.

    Attributes:
        prompt_r: prompt lengths of all committed records.
        response_r: response lengths.
        snapshots: records by hash, the largest first.
        layout: the files.
        sampled: how many records `student_mean` is of.
    """

    root: str
    meta: dict[str, Any]
    segments: int
    prompts: int
    prompt_r: np.ndarray
    response_r: np.ndarray
    truncated: float
    rewards: np.ndarray
    snapshots: dict[str, int]
    content_hash: str
    layout: StoreLayout
    sampled: int
    student_mean: float
    passes: list[PassFacts]
    examples: list[Example]


def inspect_store(files: StoreFiles) -> StoreFacts:
    """Reads a store's columns, and the tokens of a sample of its records.

    Raises:
        DataError: nothing is committed, or something that is read is damaged.
    """
    store = Store(files.root)
    layout = look(files)
    view = store.view()
    snapshots = [store.open_snapshot(name) for name in files.names("snapshots/")]
    snapshots.sort(key=len, reverse=True)
    passes = [store.open_pass(name) for name in layout.passes]
    scored = {p.name: np.array(sorted(p.committed_records(view)), np.int64) for p in passes}
    prompt_r, response_r = view.lengths()
    sample = _spaced(np.arange(len(view)), SAMPLE)
    return StoreFacts(
        root=files.root,
        meta=store.meta,
        segments=len(view.segments),
        prompts=len({prompt_id for prompt_id, _ in view.keys}),
        prompt_r=prompt_r,
        response_r=response_r,
        truncated=view.truncated(),
        rewards=view.rewards,
        snapshots={snapshot.hash: len(snapshot) for snapshot in snapshots},
        content_hash=view.hash,
        layout=layout,
        sampled=len(sample),
        student_mean=_means(view, sample)[0],
        passes=[_pass_facts(view, snapshots, p, scored[p.name]) for p in passes],
        examples=_examples(view, passes, scored),
    )


def _spaced(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of them, evenly spaced, the first and the last among them."""
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).astype(np.int64)]


def _pass_facts(
    view: RecordView, snapshots: list[Snapshot], scores: TeacherPass, scored: np.ndarray
) -> PassFacts:
    sample = _spaced(scored, SAMPLE)
    student, teacher = _means(view, sample, scores)
    return PassFacts(
        name=scores.name,
        meta=scores.meta,
        scored=len(scored),
        coverage={s.hash: (len(scores.committed_records(s)), len(s)) for s in snapshots},
        sampled=len(sample),
        teacher_mean=teacher,
        student_mean=student,
    )


def _means(
    view: RecordView, sample: np.ndarray, scores: TeacherPass | None = None
) -> tuple[float, float]:
    """Mean log-prob per response token of those records, student's and teacher's."""
    student = teacher = 0.0
    tokens = 0
    for start in range(0, len(sample), _TOGETHER):
        indices = sample[start : start + _TOGETHER].tolist()
        records = view.read_many(indices)
        student += sum(float(r.student_logprob.sum(dtype=np.float64)) for r in records)
        tokens += sum(len(r.response_ids) for r in records)
        if scores is not None:
            found = scores.read_many(view, indices, topk=False)
            teacher += sum(float(s.logprob.sum(dtype=np.float64)) for s in found)
    if not tokens:
        return float("nan"), float("nan")
    return student / tokens, teacher / tokens if scores is not None else float("nan")


def _examples(
    view: RecordView, passes: list[TeacherPass], scored: dict[str, np.ndarray]
) -> list[Example]:
    """Records from the beginning, the middle and the end."""
    indices = _spaced(np.arange(len(view)), SHOWN).tolist()
    examples: list[Example] = []
    for index, record in zip(indices, view.read_many(indices), strict=True):
        scores = {
            p.name: p.read_many(view, [index], topk=False)[0]
            for p in passes
            if index in scored[p.name]
        }
        examples.append(Example(record, scores))
    return examples
