"""Teacher passes: scores belong to the response tokens they were computed for, and to no others."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import interrupt_commits

from opd_jax.data.records import Record, Scores
from opd_jax.data.store import create_store, open_store
from opd_jax.data.store_files import StoreFiles, encode_document
from opd_jax.data.store_layout import look
from opd_jax.errors import DataError

LENGTHS = [0, 1, 16, 17, 40, 300]


def scored_store(folder, lengths=LENGTHS):
    store = create_store(folder, {"a": 1})
    with store.writer() as writer:
        for index, length in enumerate(lengths):
            ids = np.full(length, index, np.int32)
            writer.append(Record(f"p{index}", 0, ids, ids, ids.astype(np.float32), "stop"))
            if index % 2:
                writer.flush()
    return store, store.freeze(), store.create_pass("t", {"teacher": "big"})


def make_scores(index, length, k):
    rng = np.random.default_rng(index)
    logprob = -rng.exponential(size=length).astype(np.float32)
    if not k:
        return Scores(logprob)
    ids = rng.integers(0, 150_000, (length, k)).astype(np.int32)
    top = -rng.exponential(size=(length, k)).astype(np.float16)
    rest, entropy = rng.random((2, length)).astype(np.float32)
    return Scores(logprob, ids, top, rest, entropy)


def assert_same(actual, wanted):
    for name in ("logprob", "topk_ids", "topk_logprob", "topk_rest", "entropy"):
        value, expected = getattr(actual, name), getattr(wanted, name)
        if expected is None:
            assert value is None
        else:
            assert value.dtype == expected.dtype
            np.testing.assert_array_equal(value, expected)


@settings(max_examples=15)
@given(st.permutations(range(len(LENGTHS))), st.sampled_from([0, 1, 5, 64]), st.integers(1, 6))
def test_scores_come_back_whatever_order_they_were_made_in(order, k, flush_every):
    with tempfile.TemporaryDirectory() as folder:
        _, snapshot, scoring = scored_store(folder)
        with scoring.writer(snapshot) as writer:
            for count, index in enumerate(order, 1):
                writer.append(index, make_scores(index, LENGTHS[index], k))
                if count % flush_every == 0:
                    writer.flush()
        reopened = open_store(folder).open_pass("t")
        assert reopened.meta == {"teacher": "big"}
        assert reopened.committed_records(snapshot) == set(range(len(LENGTHS)))
        for index, actual in zip(order, reopened.read_many(snapshot, order), strict=True):
            assert_same(actual, make_scores(index, LENGTHS[index], k))
        reopened.verify(snapshot)


def test_a_segment_without_the_top_k_that_its_pass_promises_is_refused(tmp_path):
    store, snapshot, _ = scored_store(tmp_path)
    scoring = store.create_pass("wide", {"top_k": 2})
    with scoring.writer(snapshot) as writer:
        for index, length in enumerate(LENGTHS):
            writer.append(index, make_scores(index, length, 2 * (index != 3)))
            writer.flush()
    assert len(scoring.read_many(snapshot, [1, 2, 4])) == 3
    with pytest.raises(DataError, match=r"data/w00000-000003-\w+: has no topk_ids, and pass.json"):
        scoring.read_many(snapshot, [1, 3])
    assert scoring.read_many(snapshot, [1, 3], topk=False)[1].topk_ids is None


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_commit_is_there_once(tmp_path, monkeypatch, moment):
    _, snapshot, scoring = scored_store(tmp_path)
    interrupt_commits(monkeypatch, moment)

    def score_all():
        with scoring.writer(snapshot) as writer:
            for index, length in enumerate(LENGTHS):
                writer.append(index, make_scores(index, length, 5))
            writer.flush()

    with pytest.raises(KeyboardInterrupt):
        score_all()
    assert len(list(tmp_path.glob("teacher/t/commits/*"))) == 1
    scoring.verify(snapshot)


def test_many_shards_of_top_k_come_back(tmp_path):
    lengths = [150_000, 7, 150_000]
    _, snapshot, scoring = scored_store(tmp_path, lengths)
    with scoring.writer(snapshot) as writer:
        for index in (2, 0, 1):
            writer.append(index, make_scores(index, lengths[index], 2))
    assert len(list(Path(tmp_path).glob("teacher/t/data/*/topk_ids/c/*"))) == 2
    for index, actual in enumerate(scoring.read_many(snapshot, range(3))):
        assert_same(actual, make_scores(index, lengths[index], 2))


def test_a_restart_scores_only_what_is_missing(tmp_path):
    store, snapshot, scoring = scored_store(tmp_path)
    with scoring.writer(snapshot, process_index=0) as writer:
        for index in (0, 2, 4):
            writer.append(index, make_scores(index, LENGTHS[index], 0))
    again = store.create_pass("t", {"teacher": "big"})
    assert again.committed_records(snapshot) == {0, 2, 4}
    with pytest.raises(DataError, match=r"no scores for prompt 'p1'.*1 of 2 .*score stage"):
        again.read_many(snapshot, [0, 1])
    with again.writer(snapshot, process_index=1) as writer:
        for index in (1, 3, 5):
            writer.append(index, make_scores(index, LENGTHS[index], 0))
    assert len(again.read_many(snapshot, [0, 1])) == 2


def test_a_larger_snapshot_keeps_the_scores_of_the_smaller(tmp_path):
    store, snapshot, scoring = scored_store(tmp_path)
    with scoring.writer(snapshot) as writer:
        for index, length in enumerate(LENGTHS):
            writer.append(index, make_scores(index, length, 0))
    ids = np.zeros(3, np.int32)
    with store.writer() as writer:
        writer.append(Record("a first one", 0, ids, ids, np.zeros(3, np.float32), "stop"))
    larger = store.freeze()
    assert scoring.committed_records(larger) == {1, 2, 3, 4, 5, 6}
    assert_same(scoring.read_many(larger, [5])[0], make_scores(4, LENGTHS[4], 0))
    assert len(scoring.read_many(snapshot, [5])) == 1


@pytest.mark.parametrize("length", [0, 39, 41, 48])
@pytest.mark.parametrize("k", [0, 3])
def test_scores_of_another_length_are_refused(tmp_path, length, k):
    _, snapshot, scoring = scored_store(tmp_path)
    with (
        scoring.writer(snapshot) as writer,
        pytest.raises(DataError, match=rf"'p4', sample 0: {length} scores for a response of 40"),
    ):
        writer.append(4, make_scores(4, length, k))
    assert scoring.committed_records(snapshot) == set()


def test_contradictory_scores_are_refused(tmp_path):
    _, snapshot, scoring = scored_store(tmp_path)
    full = make_scores(2, 16, 4)
    with scoring.writer(snapshot) as writer:
        writer.append(3, make_scores(3, 17, 4))
        for scores, message in [
            (Scores(full.logprob), "has logprob, the others differ"),
            (Scores(full.logprob, full.topk_ids), "come together"),
            (replace(full, topk_logprob=full.topk_logprob[:, :3]), "widths 4 and 3"),
            (make_scores(2, 16, 5), "widths 5 and 5, others 4"),
            (replace(full, topk_ids=full.topk_ids[:9]), "9 scores"),
        ]:
            with pytest.raises(DataError, match=message):
                writer.append(2, scores)
        with pytest.raises(DataError, match="appended twice"):
            writer.append(3, make_scores(3, 17, 4))
        with pytest.raises(IndexError):
            writer.append(len(LENGTHS), full)


def test_a_record_scored_by_two_writers_is_refused(tmp_path):
    _, snapshot, scoring = scored_store(tmp_path)
    for _ in range(2):
        with scoring.writer(snapshot) as writer:
            writer.append(1, make_scores(1, 1, 0))
    with pytest.raises(DataError, match=r"record 1 has scores in .* and in .*; delete"):
        scoring.committed_records(snapshot)


def test_scores_of_another_segment_are_stale(tmp_path):
    store, snapshot, scoring = scored_store(tmp_path)
    with scoring.writer(snapshot) as writer:
        writer.append(1, make_scores(1, 1, 0))
    commit = next((tmp_path / "teacher/t/commits").iterdir())
    body = json.loads(commit.read_bytes())
    body.pop("sha256")
    body["scored_segments"][0][1] = "0" * 64
    commit.write_bytes(encode_document(body))
    with pytest.raises(DataError, match=r"scored another segment.*run the score stage again"):
        store.open_pass("t").read_many(snapshot, [1])


def test_passes_are_apart_and_named_safely(tmp_path):
    store, snapshot, scoring = scored_store(tmp_path)
    other = store.create_pass("other", {"teacher": "small"})
    with scoring.writer(snapshot) as writer:
        writer.append(1, make_scores(1, 1, 0))
    assert other.committed_records(snapshot) == set()
    with pytest.raises(DataError, match="'teacher' is 'small', this run has 'big'"):
        store.create_pass("other", {"teacher": "big"})
    with pytest.raises(DataError, match=r"teacher pass '\.\./x'"):
        store.create_pass("../x", {})
    with pytest.raises(DataError, match=r"nothing/pass.json: file is missing.*score stage"):
        store.open_pass("nothing")


def test_a_pass_is_bound_to_its_meta_and_to_a_number_of_shares(tmp_path):
    store = create_store(tmp_path, {})
    assert not store.has_pass("t")
    store.create_pass("t", {"batch_tokens": 64})
    assert store.has_pass("t")
    with pytest.raises(DataError, match="'batch_tokens' is 64, this run has 32; begin anew"):
        store.create_pass("t", {"batch_tokens": 32}, "begin anew")
    store.settle_shares("t", 2)
    store.settle_shares("t", 2)
    with pytest.raises(DataError, match=r"'shares' is 2, this run has 3; .*without --share, or"):
        store.settle_shares("t", 3)
    assert look(store.files).foreign == []


def test_of_two_writers_of_a_new_document_one_wins(tmp_path):
    files = StoreFiles(tmp_path)
    files.write_new("a", b"1")
    files.write_new("a", b"2")
    assert files.read("a", "") == b"1"
