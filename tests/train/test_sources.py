import numpy as np
import pytest
from models import tiny

from opd_jax.config import LoopConfig, SamplingConfig
from opd_jax.data.collate import pack
from opd_jax.data.loader import step_order
from opd_jax.data.records import Record, Scores
from opd_jax.data.store import create_store
from opd_jax.errors import ConfigError
from opd_jax.teacher.score import Scorer
from opd_jax.train.sources import (
    LiveTeacher,
    offline_source,
    online_source,
    sft_source,
    support_size,
)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A snapshot of 12 records, each of whose tokens is its number, and a pass over it."""
    store = create_store(tmp_path_factory.mktemp("store") / "s", {})
    with store.writer() as writer:
        for i in range(12):
            t = 3 + i % 4
            logprob = np.full(t, -float(i + 1), np.float32)
            ids = np.full(t, i, np.int32)
            writer.append(Record(f"p{i:02}", 0, np.full(2, i, np.int32), ids, logprob, "stop"))
    snapshot = store.freeze()
    scores = store.create_pass("t", {})
    with scores.writer(snapshot, 0) as writer:
        for i, record in enumerate(snapshot.read_many(range(12))):
            value = np.full(len(record.response_ids), -0.5 * (i + 1), np.float32)
            writer.append(i, Scores(value))
    return snapshot, scores


def steps_of(source, start, count):
    next_batch = source(start)
    return [next_batch(step, dict) for step in range(start, start + count)]


def test_offline_batches_resume_and_keep_scores_with_their_records(scored):
    source = offline_source(*scored, support=0, batch_size=4, seed=3)
    straight, resumed = steps_of(source, 0, 6), steps_of(source, 4, 2)
    for a, b in zip(straight[4:], resumed, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    for batch in straight:
        number = batch["input_bt"][:, 0]
        for row, mask in enumerate(batch["mask_bt"]):
            assert np.all(batch["sampler_bt"][row][mask] == -(number[row] + 1.0))
            assert np.all(batch["teacher_bt"][row][mask] == -0.5 * (number[row] + 1))
    first_epoch = np.concatenate([b["input_bt"][:, 0] for b in straight[:3]])
    assert sorted(first_epoch) == list(range(12))


def test_sft_rows_hold_every_answer_once_an_epoch(scored):
    snapshot, _ = scored
    source = sft_source(snapshot, range(12), row_tokens=16, batch_rows=1, seed=0)
    prompt_r, response_r = snapshot.lengths()
    epoch = len(pack((prompt_r + response_r - 1).tolist(), 16))
    rows = steps_of(source, 0, 2 * epoch)
    for first in (0, epoch):
        targets = np.concatenate(
            [r["target_bt"][r["mask_bt"]] for r in rows[first : first + epoch]]
        )
        seen, count = np.unique(targets, return_counts=True)
        np.testing.assert_array_equal(seen, np.arange(12))
        np.testing.assert_array_equal(count, response_r)


def test_an_answer_that_does_not_fit_a_row_is_refused(scored):
    with pytest.raises(ConfigError, match=r"row_tokens=6 would cut the longest answer \(7 tokens"):
        sft_source(scored[0], range(12), row_tokens=6, batch_rows=1, seed=0)


def test_support_size():
    assert support_size(8, None) == 8
    assert support_size(8, 3) == 3
    with pytest.raises(ConfigError, match="the pass has none"):
        support_size(0, None)
    with pytest.raises(ConfigError, match="support=9 is more than the 8 stored"):
        support_size(8, 9)


def test_online_batches_follow_the_offline_order_of_prompts_and_samples():
    model, params = tiny()
    prompts = [(f"p{i}", [i + 1, i + 1]) for i in range(3)]
    sampling = SamplingConfig(max_new_tokens=4, samples_per_prompt=2, slots=4)
    scorer = Scorer(model, params, batch_tokens=16)
    live = LiveTeacher(model, scorer, prompts, sampling, end_ids=(0,), seed=5, text=str)
    loop = LoopConfig(batch_size=4)
    order = step_order(6, 4, 5)
    next_batch = online_source(live, 0, loop)(0)
    batches = [next_batch(step, lambda: params) for step in range(3)]
    for step, batch in enumerate(batches):
        wanted = [order[4 * step + i] // 2 + 1 for i in range(4)]
        assert batch["input_bt"][:, 0].tolist() == wanted
        # The teacher here is the student: it gives what the sampler gave.
        np.testing.assert_allclose(batch["teacher_bt"], batch["sampler_bt"], atol=1e-4)
    rows = {tuple(row) for batch in batches for row in batch["target_bt"].tolist()}
    assert len(rows) > 6  # two samples of a prompt differ, and so do two steps
