import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny

from opd_jax.config import MeshConfig, SamplingConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.data.collate import Scored
from opd_jax.data.records import Record, Scores
from opd_jax.errors import DataError
from opd_jax.teacher.score import Scorer
from opd_jax.train.objective_probe import TopKProbe
from opd_jax.train.probes import AnswerProbe, FreshProbe, HeldOutProbe, held_out
from opd_jax.train.sources import Packing
from opd_jax.train.step import Objective


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(0, 20))
def test_held_out_prompts_are_whole_and_few(prompts, samples, wanted):
    names = [f"p{i}" for i in range(prompts) for _ in range(samples)]
    train, kept = held_out(names, wanted)
    assert sorted([*train, *kept]) == list(range(len(names)))
    assert not {names[i] for i in train} & {names[i] for i in kept}
    assert len(kept) <= min(wanted, len(names) // 10)


def test_what_is_held_out_depends_on_the_prompts_alone():
    names = [f"p{i}" for i in range(50)]
    kept = {names[i] for i in held_out(names, 5)[1]}
    again = {names[::-1][i] for i in held_out(names[::-1], 5)[1]}
    assert kept == again
    assert len(kept) == 5


def records(model, params, n=4):
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        ids = rng.integers(0, 64, 5 + i).astype(np.int32)
        made.append(Record(f"p{i}", 0, ids[:2], ids[2:], np.full(3 + i, -1.0, np.float32), "stop"))
    scores = Scorer(model, params, batch_tokens=32).score_all(made, 16)
    return [
        Record(r.prompt_id, 0, r.prompt_ids, r.response_ids, s.logprob, "stop")
        for r, s in zip(made, scores, strict=True)
    ]


def test_held_out_figures_of_the_sampler_itself_are_at_rest():
    model, params = tiny()
    found = records(model, params)
    scored = [Scored(r, Scores(r.student_logprob - np.float32(0.5))) for r in found]
    figures = HeldOutProbe(model, scored, 10.0, 32)(params)
    assert figures["heldout_w"] == pytest.approx(1.0, abs=1e-4)
    assert figures["heldout_w_std"] < 1e-4
    assert figures["heldout_reverse_kl_estimate"] == pytest.approx(0.5, abs=1e-4)
    assert figures["heldout_half_squared_advantage"] == pytest.approx(0.125, abs=1e-4)
    assert 0 < figures["heldout_entropy"] < np.log(64)


@pytest.mark.slow
def test_the_top_k_objective_on_held_out_rollouts_is_that_of_a_hand_count():
    """In three micro-batches, the last of them not full, and on a mesh."""
    model, params = tiny()
    teacher = jax.tree.map(lambda x: 1.3 * x, params)
    found = records(model, params, 5)
    scores = Scorer(model, teacher, top_k=4, batch_tokens=32).score_all(found, 16)
    scored = [*map(Scored, found, scores)]
    total = tokens = 0
    for record, score in zip(found, scores, strict=True):
        ids = np.concatenate([record.prompt_ids, record.response_ids])[None]
        out = model.forward(params, ids, np.arange(ids.shape[1])[None])
        logits = np.asarray(out.hidden_btd @ out.head_vd.T, np.float64)[0]
        p = np.exp(logits[len(record.prompt_ids) - 1 : -1])
        p = np.take_along_axis(p, score.topk_ids, 1)
        q = np.exp(np.float64(score.topk_logprob))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        total, tokens = total + np.sum(p * np.log(p / q)), tokens + len(p)
    objective = Objective("topk")
    for ways, mesh in ((1, None), (2, make_mesh(MeshConfig(fsdp=2, tensor=2)))):
        model, params = tiny(mesh)
        probe = TopKProbe(model, objective, scored, Packing(8, 2, ways, support=4))
        assert probe(params)["heldout_topk_kl"] == pytest.approx(total / tokens, rel=1e-4)
    assert total / tokens > 0.01


def test_the_teacher_s_own_answers_have_no_gap():
    model, params = tiny()
    figures = AnswerProbe(model, records(model, params), 32)(params)
    assert figures["heldout_gap"] == pytest.approx(0.0, abs=1e-4)
    assert figures["heldout_nll"] > 1


def test_fresh_samples_are_graded_and_scored():
    model, params = tiny()
    probe = FreshProbe(
        model=model,
        prompts=[(f"p{i}", [i + 1, i + 2]) for i in range(4)],
        sampling=SamplingConfig(max_new_tokens=6, slots=4),
        end_ids=(0,),
        seed=1,
        text=None,
        grade=lambda record: record.prompt_id in ("p0", "p2", "p3"),
        teacher=Scorer(model, params, batch_tokens=32),
    )
    figures = probe(params)
    assert figures["fresh_accuracy"] == 0.75
    assert figures["fresh_accuracy_stderr"] == pytest.approx(0.25, abs=0.01)
    assert figures["fresh_reverse_kl"] == pytest.approx(0.0, abs=1e-4)  # the teacher is the student
    assert 0 < figures["fresh_tokens"] <= 6
    assert probe(params) == figures
    known = dataclasses.replace(
        probe, grade=lambda record: {"p0": True, "p2": False}.get(record.prompt_id)
    )
    assert known(params)["fresh_accuracy"] == 0.5  # of those that can be graded
    other = probe(model.init(jax.random.key(5)))
    assert other["fresh_reverse_kl"] > 0.001


def test_a_student_that_has_diverged_is_not_called_a_teacher():
    model, params = tiny()
    answers = records(model, params)
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), params)
    with pytest.raises(DataError, match=r"student: log-prob nan .*it has diverged.*lower optim"):
        AnswerProbe(model, answers, 32)(broken)
