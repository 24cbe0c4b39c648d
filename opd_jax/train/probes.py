"""What is measured at an evaluation: held-out rollouts or answers, and fresh samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from opd_jax.algo.drift import drift
from opd_jax.algo.estimates import Estimate, accuracy_estimate, reverse_kl_estimate
from opd_jax.config import SamplingConfig
from opd_jax.core.rng import stable_hash
from opd_jax.data.collate import Scored, bucket_length
from opd_jax.data.records import Record, Scores
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.sampling.collect import requests_for, to_record
from opd_jax.sampling.sampler import Plan, SamplingJob, generate, plan_for
from opd_jax.sampling.stops import Text
from opd_jax.teacher.score import Scorer
from opd_jax.train.guard import Figures

Probe = Callable[[Params], Figures]


def held_out(prompt_ids: Sequence[str], wanted: int) -> tuple[list[int], list[int]]:
    """Records to train on, and about `wanted` to keep out: at most a tenth, by whole prompts.

    Which prompts are kept out depends on their ids alone.
    """
    room = min(wanted, len(prompt_ids) // 10)
    by_prompt: dict[str, list[int]] = {}
    for index, name in enumerate(prompt_ids):
        by_prompt.setdefault(name, []).append(index)
    kept: list[int] = []
    for name in sorted(by_prompt, key=lambda name: stable_hash(f"heldout/{name}")):
        if len(kept) + len(by_prompt[name]) > room:
            break
        kept += by_prompt[name]
    out = set(kept)
    return [i for i in range(len(prompt_ids)) if i not in out], sorted(kept)


@dataclass(frozen=True)
class HeldOutProbe:
    """Held-out rollouts under the student: the figures of `algo.drift`, and the entropy."""

    model: LanguageModel
    scored: Sequence[Scored]
    tau: float
    batch_tokens: int

    def __call__(self, params: Params) -> Figures:
        tokens = self.batch_tokens
        scorer = Scorer(self.model, params, batch_tokens=tokens, entropy=True, role="student")
        found = _scored(scorer, [s.record for s in self.scored])
        figures = drift(
            [scores.logprob for scores in found],
            [s.scores.logprob for s in self.scored],
            [s.record.student_logprob for s in self.scored],
            self.tau,
        )
        entropy = np.concatenate([s.entropy for s in found if s.entropy is not None])
        figures["entropy"] = float(np.mean(entropy, dtype=np.float64))
        return {f"heldout_{name}": value for name, value in figures.items()}


@dataclass(frozen=True)
class AnswerProbe:
    """Held-out answers of the teacher: the student's NLL per token, and the teacher's own."""

    model: LanguageModel
    answers: Sequence[Record]
    batch_tokens: int

    def __call__(self, params: Params) -> Figures:
        scorer = Scorer(self.model, params, batch_tokens=self.batch_tokens, role="student")
        found = _scored(scorer, self.answers)
        student = np.concatenate([scores.logprob for scores in found]).astype(np.float64)
        teacher = np.concatenate([r.student_logprob for r in self.answers]).astype(np.float64)
        nll, own = -float(np.mean(student)), -float(np.mean(teacher))
        return {"heldout_nll": nll, "heldout_teacher_nll": own, "heldout_gap": nll - own}


def fresh_sampling(rollout: SamplingConfig, prompts: int) -> SamplingConfig:
    """How so many prompts are answered at an evaluation: plainly, once, and all at a time."""
    return SamplingConfig(
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        stop=rollout.stop,
        slots=min(rollout.slots, 1 << (prompts - 1).bit_length()),
    )


@dataclass
class FreshProbe:
    """Fresh samples of the student on held-out prompts: accuracy, length, reverse KL.

    The same seed each time: two evaluations differ by the student, not by the draw.

    Attributes:
        grade: whether a response is right, of one that can be graded; `None`: none can.
        teacher: `None` where no teacher is loaded.
    """

    model: LanguageModel
    prompts: Sequence[tuple[str, Sequence[int]]]
    sampling: SamplingConfig
    end_ids: tuple[int, ...]
    seed: int
    text: Text | None
    """What to look for stop strings in."""
    grade: Callable[[Record], bool | None] | None = None
    teacher: Scorer | None = None
    _plan: Plan | None = field(default=None, init=False)

    def __call__(self, params: Params) -> Figures:
        records = self._sample(params)
        n, clusters = len(records), [record.prompt_id for record in records]
        cut = sum(record.finish_reason == "length" for record in records)
        tokens = sum(len(record.response_ids) for record in records)
        figures = {"fresh_tokens": tokens / n, "fresh_truncated": cut / n}
        if self.grade is not None:
            graded = [(record.prompt_id, self.grade(record)) for record in records]
            known = [(name, right) for name, right in graded if right is not None]
            names, right = [name for name, _ in known], [right for _, right in known]
            figures |= _with_error("fresh_accuracy", accuracy_estimate(right, names))
        if self.teacher is not None:
            longest = max(len(ids) for _, ids in self.prompts) + self.sampling.max_new_tokens
            length = bucket_length(longest - 1, self.teacher.parts)
            found = self.teacher.score_all(records, length)
            student, teacher = ([r.student_logprob for r in records], [s.logprob for s in found])
            figures |= _with_error(
                "fresh_reverse_kl", reverse_kl_estimate(student, teacher, clusters)
            )
        return figures

    def _sample(self, params: Params) -> list[Record]:
        requests = requests_for(self.prompts, self.sampling.samples_per_prompt)
        job = SamplingJob(self.model, params, self.sampling, self.end_ids, self.seed, self.text)
        self._plan = self._plan or plan_for(job, requests)
        samples = [to_record(sample) for sample in generate(job, requests, self._plan)]
        return sorted(samples, key=lambda record: (record.prompt_id, record.sample_index))


def _scored(scorer: Scorer, records: Sequence[Record]) -> list[Scores]:
    longest = max(len(r.prompt_ids) + len(r.response_ids) for r in records)
    return scorer.score_all(records, bucket_length(longest - 1, scorer.parts))


def _with_error(name: str, estimate: Estimate) -> Figures:
    return {name: estimate.mean, f"{name}_stderr": estimate.stderr}
