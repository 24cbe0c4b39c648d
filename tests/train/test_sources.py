import jax
import numpy as np
import pytest
from models import tiny

from opd_jax.config import SamplingConfig
from opd_jax.config_train import LoopConfig, TrainRun
from opd_jax.data.collate import pack
from opd_jax.data.loader import step_order
from opd_jax.data.records import Record, Scores
from opd_jax.data.store import create_store
from opd_jax.errors import ConfigError, DataError, Preempted
from opd_jax.sampling.collect import requests_for, to_record, until_told
from opd_jax.sampling.sampler import SamplingJob, generate
from opd_jax.teacher.score import Scorer
from opd_jax.train import sources
from opd_jax.train.meter import Load
from opd_jax.train.sources import (
    LiveTeacher,
    Packing,
    offline_source,
    online_source,
    sft_source,
    support_size,
)
from opd_jax.train.step import Objective, gradients


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
    next_batch = source.start(start)
    return [next_batch(step, dict) for step in range(start, start + count)]


def offline(scored, run, row_tokens=8):
    packing = Packing(row_tokens, run.micro_batch_size)
    return offline_source(*scored, range(12), run, packing, seed=3)


def test_offline_batches_resume_and_keep_scores_with_their_records(scored):
    source = offline(scored, TrainRun(batch_size=4, steps=6, save_every=1))
    straight, resumed = steps_of(source, 0, 6), steps_of(source, 4, 2)
    for a, b in zip(straight[4:], resumed, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    seen = []
    for batch in straight:
        mask = batch["mask_bt"]
        number = batch["input_bt"][mask] % 100  # each token of a record is its number
        assert np.all(batch["sampler_bt"][mask] == -(number + 1.0))
        assert np.all(batch["teacher_bt"][mask] == -0.5 * (number + 1))
        assert batch["weight_bt"].sum() == pytest.approx(4)
        seen += sorted(set(number.tolist()))
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))  # twice an epoch


def test_a_step_is_packed_and_its_rows_come_in_micro_batches(scored):
    source = offline(scored, TrainRun(batch_size=6, steps=4, micro_batch_size=2), row_tokens=14)
    for batch in steps_of(source, 0, 4):
        rows = [batch["segments_bt"][i :: source.pieces] for i in range(source.pieces)]
        assert [len(piece) for piece in rows] == [2] * source.pieces
        filled = [bool(piece.any()) for piece in rows]
        assert filled == sorted(filled, reverse=True)  # the empty ones come last
        assert batch["segments_bt"].max() >= 2
        assert batch["weight_bt"].sum() == pytest.approx(6)


def test_a_step_can_be_measured_in_tokens(scored):
    tokens = sum(scored[0].lengths())
    run = TrainRun(batch_tokens=24, steps=8)
    taken = []
    for batch in steps_of(offline(scored, run), 0, 8):
        numbers = sorted({*batch["input_bt"][batch["segments_bt"] > 0].tolist()})
        assert sum(tokens[number] for number in numbers) <= 24
        taken += numbers
    assert len(taken) > 24
    assert set(taken) == set(range(12))
    with pytest.raises(DataError, match="batch_tokens=7 is less than the 8 tokens of the longest"):
        offline(scored, TrainRun(batch_tokens=7, steps=8))


def test_per_token_weights_are_all_one(scored):
    run = TrainRun(batch_size=4, average="token", steps=1, save_every=1)
    packing = Packing.of(run, longest=9, ways=4, support=0)
    (batch,) = steps_of(offline_source(*scored, range(12), run, packing, seed=0), 0, 1)
    assert np.array_equal(batch["weight_bt"], batch["mask_bt"])
    assert len(batch["mask_bt"]) % 4 == 0
    with pytest.raises(ConfigError, match="row_tokens=8 is too short for the longest response, 10"):
        Packing.of(TrainRun(row_tokens=8), longest=10, ways=1, support=0)
    for parts, wanted in ((1, 16), (2, 16), (3, 48), (32, 32)):
        assert Packing.of(run, longest=9, ways=4, support=0, parts=parts).row_tokens == wanted


def test_sft_rows_hold_every_answer_once_an_epoch(scored):
    snapshot, _ = scored
    loop = LoopConfig(batch_size=1, steps=60)
    source = sft_source(snapshot, range(12), row_tokens=16, loop=loop, seed=0)
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


@pytest.mark.parametrize("kind", ["opd", "sft"])
def test_a_process_reads_the_records_of_its_rows_alone(scored, monkeypatch, kind):
    """Of rows that others hold it has the lengths, from which all count the same work."""
    snapshot, scores = scored
    run = TrainRun(batch_size=6, steps=1, micro_batch_size=2, save_every=1)
    loop = LoopConfig(batch_size=4, steps=1)

    def source():
        if kind == "sft":
            return sft_source(snapshot, range(12), 8, loop, seed=0)
        return offline_source(snapshot, scores, range(12), run, Packing(8, 2), seed=3)

    (whole,) = steps_of(source(), 0, 1)
    read, read_many = [], type(snapshot).read_many

    def counted(self, indices):
        read.extend(indices)
        return read_many(self, indices)

    monkeypatch.setattr(type(snapshot), "read_many", counted)
    held = []
    for process in range(2):
        here = np.arange(len(whole["mask_bt"])) % 4 // 2 == process
        monkeypatch.setattr(sources, "rows_here", lambda _mesh, _rows, here=here: here)
        read.clear()
        (batch,) = steps_of(source(), 0, 1)
        assert len(read) == sum(int(row.max()) for row in batch["segments_bt"][here])
        held.append(set(read))
        for name, x in whole.items():
            np.testing.assert_array_equal(batch[name][here], x[here])
            if name in ("positions_bt", "segments_bt", "mask_bt"):
                np.testing.assert_array_equal(batch[name], x)
            elif name in ("input_bt", "target_bt"):
                assert not batch[name][~here].any()
        assert Load.of(batch, 2) == Load.of(whole, 2)
    assert not held[0] & held[1]
    assert all(held)


def test_an_answer_that_does_not_fit_a_row_is_refused(scored):
    with pytest.raises(ConfigError, match=r"row_tokens=6 would cut the longest answer \(7 tokens"):
        sft_source(scored[0], range(12), row_tokens=6, loop=LoopConfig(batch_size=1), seed=0)


def test_support_size():
    assert support_size(8, None) == 8
    assert support_size(8, 3) == 3
    assert support_size(8, 1, tail=True) == support_size(1, None, tail=True) == 1
    for stored, wanted in ((8, 1), (1, None)):
        with pytest.raises(ConfigError, match="one token and no tail has no loss"):
            support_size(stored, wanted)
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
    run = TrainRun(algorithm="opd", batch_size=4, steps=3, save_every=1)
    order = step_order(6, 4, 5)
    next_batch = online_source(live, run, Packing(5)).start(0)
    batches = [next_batch(step, lambda: params) for step in range(3)]
    seen = set()
    for step, batch in enumerate(batches):
        wanted = sorted(order[4 * step + i] // 2 + 1 for i in range(4))
        first = (batch["positions_bt"] == 0) & (batch["segments_bt"] > 0)
        assert sorted(batch["input_bt"][first].tolist()) == wanted
        # The teacher here is the student: it gives what the sampler gave.
        np.testing.assert_allclose(batch["teacher_bt"], batch["sampler_bt"], atol=1e-4)
        seen |= {tuple(row) for row in batch["target_bt"].tolist() if any(row)}
    assert len(seen) > 6  # two samples of a prompt differ, and so do two steps


def test_the_first_online_step_is_the_offline_one(tmp_path):
    """The same samples, scores, loss and gradient: only where later samples come from differs."""
    model, params = tiny()
    teacher = jax.tree.map(lambda x: 1.3 * x, params)
    prompts = [(f"p{i}", [i + 1, i + 1]) for i in range(3)]
    sampling = SamplingConfig(max_new_tokens=4, samples_per_prompt=2, slots=4)
    scorer = Scorer(model, teacher, batch_tokens=16)
    run = TrainRun(algorithm="opd", batch_size=4, steps=1, save_every=1)
    live = LiveTeacher(model, scorer, prompts, sampling, end_ids=(0,), seed=5, text=str)
    online = online_source(live, run, Packing(5)).start(0)(0, lambda: params)

    store = create_store(tmp_path / "s", {})
    job = SamplingJob(model, params, sampling, (0,), seed=5)
    with store.writer() as writer:
        for sample in generate(job, requests_for(prompts, 2)):
            writer.append(to_record(sample))
    snapshot, scores = store.freeze(), store.create_pass("t", {})
    with scores.writer(snapshot) as writer:
        for i, found in enumerate(scorer.score_all(snapshot.read_many(range(6)), 5)):
            writer.append(i, found)
    (offline,) = steps_of(offline_source(snapshot, scores, range(6), run, Packing(5), seed=5), 0, 1)

    step = jax.jit(gradients, static_argnums=(0, 1, 4))
    ends = [step(model, Objective("sampled"), params, x, 1) for x in (online, offline)]
    assert float(ends[0][1].sums["abs_advantage"]) > 0.1
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_samples_for_several_steps_are_those_of_single_steps():
    """As long as the student does not change: then only when they are drawn differs."""
    model, params = tiny()
    prompts = [(f"p{i}", [i + 1, i + 1]) for i in range(4)]
    sampling = SamplingConfig(max_new_tokens=4, slots=4)
    scorer = Scorer(model, params, batch_tokens=16)
    live = LiveTeacher(model, scorer, prompts, sampling, end_ids=(0,), seed=5, text=str)
    found = []
    for each in (1, 2):
        run = TrainRun(algorithm="opd", batch_size=2, steps=4, save_every=2, steps_per_batch=each)
        next_batch = online_source(live, run, Packing(5)).start(0)
        found.append([next_batch(step, lambda: params)["target_bt"] for step in range(4)])
    for one, two in zip(*found, strict=True):
        assert sorted(map(tuple, one[one.any(1)])) == sorted(map(tuple, two[two.any(1)]))


def test_a_draw_ends_where_several_processes_are_told_to(monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr("opd_jax.sampling.collect.told", lambda: next(answers))
    found = []
    with pytest.raises(Preempted):
        found.extend(until_told(iter([["a", "b"], ["c"], ["d"]])))
    assert found == ["a", "b", "c"]


def test_online_batches_are_drawn_so(monkeypatch):
    model, params = tiny()
    prompts, sampling = [("a", [1, 2]), ("b", [3])], SamplingConfig(max_new_tokens=3, slots=2)
    scorer = Scorer(model, params, batch_tokens=16)
    live = LiveTeacher(model, scorer, prompts, sampling, end_ids=(0,), seed=5, text=str)
    run = TrainRun(algorithm="opd", batch_size=2, steps=1)
    monkeypatch.setattr("opd_jax.sampling.collect.told", lambda: True)
    source = online_source(live, run, Packing(5))
    assert source.draws
    with pytest.raises(Preempted):
        source.start(0)(0, lambda: params)
