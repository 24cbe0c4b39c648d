"""The store on an S3-compatible server: all that it does in a folder, it does there."""

import numpy as np
import pytest
from test_store import META, assert_same, make_record, write_all

from opd_jax.data.records import Scores
from opd_jax.data.store import create_store, open_store
from opd_jax.data.store_files import StoreFiles
from opd_jax.errors import DataError
from opd_jax.main import main

RECORDS = [make_record(f"p{i}", s, response=9 + 40 * i) for i in range(6) for s in range(2)]


def scores_of(record):
    logprob = record.student_logprob - np.float32(0.5)
    ids = np.stack([record.response_ids, record.response_ids + 1], axis=1)
    return Scores(logprob, ids, np.stack([logprob, logprob - 1], axis=1).astype(np.float16))


def write_pass(store, snapshot, indices):
    scoring = store.create_pass("t", {"teacher": "big"})
    with scoring.writer(snapshot) as writer:
        for index, record in zip(indices, snapshot.read_many(indices), strict=True):
            writer.append(index, scores_of(record))
    return scoring


def test_rollouts_and_scores_are_those_of_a_local_store(bucket, tmp_path):
    """Written in two runs there, in one here: the same snapshot, records and scores."""
    local = create_store(tmp_path, META)
    write_all(local, RECORDS)
    write_all(create_store(f"{bucket}/a/store", META), RECORDS[:5], flush_every=3)
    store = open_store(f"{bucket}/a/store/")
    assert store.meta == META
    assert store.committed_keys() == {(r.prompt_id, r.sample_index) for r in RECORDS[:5]}
    write_all(store, RECORDS[5:], process_index=1)
    snapshot = store.freeze()
    assert snapshot.hash == local.freeze().hash == store.open_snapshot(snapshot.hash).hash
    snapshot.verify()
    for actual, wanted in zip(snapshot.read_many(range(12)), RECORDS, strict=True):
        assert_same(actual, wanted)
    write_pass(store, snapshot, range(7))
    again = open_store(f"{bucket}/a/store").open_pass("t")
    assert again.committed_records(snapshot) == set(range(7))
    write_pass(store, snapshot, range(7, 12))
    again.verify(snapshot)
    for scores, record in zip(again.read_many(snapshot, range(12)), RECORDS, strict=True):
        for name in ("logprob", "topk_ids", "topk_logprob"):
            np.testing.assert_array_equal(getattr(scores, name), getattr(scores_of(record), name))


def test_duplicates_and_another_run_are_refused(bucket):
    store = create_store(bucket, META)
    write_all(store, RECORDS[:2])
    with pytest.raises(DataError, match="'tokenizer' is 'abc', this run has 'xyz'"):
        create_store(bucket, {**META, "tokenizer": "xyz"})
    write_all(store, RECORDS[1:3], process_index=1)
    with pytest.raises(DataError, match=r"'p0', sample 1 was committed twice.*delete commits/w0"):
        store.freeze()


@pytest.mark.parametrize("kind", ["commits/", "snapshots/", "records.npz", "response_ids/c/0"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "removed"])
def test_damage_is_found_and_named_with_its_address(bucket, kind, harm):
    store = create_store(f"{bucket}/s", META)
    write_all(store, RECORDS)
    snapshot_hash = store.freeze().hash
    kvstore = StoreFiles(f"{bucket}/s").kvstore
    key = next(key for key in kvstore.list().result() if kind in key.decode())
    raw = kvstore.read(key).result().value
    flipped = raw[:40] + bytes([raw[40] ^ 1]) + raw[41:]
    kvstore.write(key, {"flipped": flipped, "cut": raw[:-5], "removed": None}[harm]).result()
    with pytest.raises(DataError, match=f"^{bucket}/s/") as caught:
        open_store(f"{bucket}/s").open_snapshot(snapshot_hash).verify()
    assert "\n" not in str(caught.value)


def test_what_is_removed_is_gone_and_its_neighbours_stay(bucket):
    for name in ("rollouts", "rollouts2", "rollout"):
        write_all(create_store(f"{bucket}/run/{name}", META), RECORDS[:1])
    files = StoreFiles(f"{bucket}/run/rollouts")
    assert not files.is_empty()
    files.remove()
    assert files.is_empty()
    for name in ("rollouts2", "rollout"):
        open_store(f"{bucket}/run/{name}").freeze().verify()
    with pytest.raises(DataError, match=r"rollouts/dataset.json: file is missing"):
        open_store(f"{bucket}/run/rollouts")
    write_all(create_store(f"{bucket}/run/rollouts", {"tokenizer": "xyz"}), RECORDS[:1])


def test_a_removal_that_is_killed_leaves_nothing_that_a_reader_lists(bucket, monkeypatch):
    root = f"{bucket}/run"
    store = create_store(root, META)
    write_all(store, RECORDS)
    write_pass(store, store.freeze(), range(12))
    files = StoreFiles(root)
    whole = len(files.kvstore.list().result())
    monkeypatch.setattr("opd_jax.data.store_files.ts.KvStore.KeyRange", None)
    with pytest.raises(TypeError):
        files.remove()
    assert 0 < len(files.kvstore.list().result()) < whole
    assert create_store(root, {"tokenizer": "xyz"}).committed_keys() == set()


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    for root, cause in [(f"{bucket}-none/s", "NoSuchBucket|404"), ("s3://x", "Invalid S3 bucket")]:
        with pytest.raises(DataError, match=rf"^{root}.*({cause}).*;") as caught:
            create_store(root, META)
        assert "\n" not in str(caught.value)


def test_verify_and_inspect_work_there(bucket, capsys):
    url = f"{bucket}/store"
    store = create_store(url, META)
    write_all(store, RECORDS, flush_every=4)
    write_pass(store, store.freeze(), range(12))
    assert main(["--verify", url]) == 0
    assert main(["--inspect", url]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "records 12, of 6 prompts, in 3 segments" in told
    (segment, *_) = sorted(store.files.names("commits/"))
    key = f"data/{segment}/records.npz"
    whole = store.files.read(key, "")
    store.files.kvstore.write(key, whole[:-1] + b"?").result()
    assert main(["--verify", url]) != 0
    assert key in capsys.readouterr().out
