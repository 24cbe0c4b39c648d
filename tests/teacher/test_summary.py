"""What is told of a finished pass, against numpy over all tokens at once."""

import numpy as np
import pytest

from opd_jax.data.records import Record, Scores
from opd_jax.data.store import create_store
from opd_jax.teacher import summary
from opd_jax.teacher.summary import lines, marked, summarize


@pytest.fixture
def scored(tmp_path):
    """A store with a pass, and all its log-probs in one array each."""
    rng = np.random.default_rng(3)
    store = create_store(tmp_path / "store", {})
    teacher, student = [], []
    with store.writer() as writer:
        for i in range(30):
            ids = rng.integers(0, 50, rng.integers(1, 40)).astype(np.int32)
            student.append((-rng.exponential(0.5, len(ids))).astype(np.float32))
            teacher.append((-rng.exponential(1.0, len(ids))).astype(np.float32))
            writer.append(Record(f"p{i:02d}", 0, ids[:3], ids, student[-1], "stop"))
    snapshot = store.freeze()
    with store.create_pass("t", {}).writer(snapshot) as writer:
        for i, logprob in enumerate(teacher):
            writer.append(i, Scores(logprob))
    return snapshot, store.open_pass("t"), np.concatenate(teacher), np.concatenate(student)


def decode(ids):
    return "".join(f"<{i}>" for i in ids)


def test_figures_are_those_of_all_tokens(scored, monkeypatch):
    snapshot, scores, teacher, student = scored
    monkeypatch.setattr(summary, "RECORDS_AT_ONCE", 7)
    found = summarize(snapshot, scores, decode)
    assert found["tokens"] == len(teacher)
    assert found["teacher"] == pytest.approx(teacher.mean(), abs=1e-6)
    assert found["student"] == pytest.approx(student.mean(), abs=1e-6)
    assert found["difference"] == pytest.approx((teacher - student).mean(), abs=1e-6)
    assert found["apart"] == pytest.approx(np.mean(np.abs(teacher - student) > 1))
    for q, value in found["quantiles"].items():
        rank = max(int(np.ceil(float(q) * len(teacher))), 1)
        assert value == pytest.approx(np.sort(teacher)[rank - 1], abs=summary.BIN)
    lowest = np.sort(teacher)[: summary.SURPRISING]
    np.testing.assert_allclose([t["teacher"] for t in found["surprising"]], lowest, rtol=1e-6)


def test_the_most_surprising_token_stands_in_its_context(scored):
    snapshot, scores, *_ = scored
    found = summarize(snapshot, scores, decode)["surprising"][0]
    index = [key[0] for key in snapshot.keys].index(found["prompt_id"])
    record = snapshot.read_many([index])[0]
    at = found["token"]
    assert scores.read_many(snapshot, [index])[0].logprob[at] == np.float32(found["teacher"])
    assert record.student_logprob[at] == np.float32(found["student"])
    ids = np.concatenate([record.prompt_ids, record.response_ids])
    place = len(record.prompt_ids) + at
    assert found["text"] == decode(ids[place : place + 1])
    assert found["before"] == decode(ids[max(place - summary.BEFORE, 0) : place])
    assert found["after"] == decode(ids[place + 1 : place + 1 + summary.AFTER])


def test_lines_are_lines(scored):
    snapshot, scores, *_ = scored
    told = lines(summarize(snapshot, scores, lambda ids: "a\nb"), shown=5)
    assert len(told) == 6
    assert not any("\n" in line for line in told)
    assert marked({"before": "x\ny", "text": " z", "after": "!"}) == "x\\ny⟦ z⟧!"
