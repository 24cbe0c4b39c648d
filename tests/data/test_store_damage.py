"""Damage is an error that names the file and the repair, never another number."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from opd_jax.config_train import TrainRun
from opd_jax.data.records import Record, Scores
from opd_jax.data.store import create_store, open_store
from opd_jax.data.store_files import StoreFiles, encode_document
from opd_jax.data.store_verify import verify_store
from opd_jax.errors import DataError
from opd_jax.train.sources import Packing, offline_source

RECORDS = 12
FLIPS, CUTS = 40, 8  # of each of the 17 kinds of file: 680 flips and 136 cuts
UNREAD = "zarr.json"  # for other programs: no reader here needs it
KINDS = [
    "dataset.json",
    "commits/*.json",
    "snapshots/*.json",
    "data/*/records.npz",
    "data/*/*/zarr.json",
    "data/*/prompt_ids/c/0",
    "data/*/response_ids/c/0",
    "data/*/student_logprob/c/0",
    "teacher/t/pass.json",
    "teacher/t/commits/*.json",
    "teacher/t/data/*/records.npz",
    "teacher/t/data/*/*/zarr.json",
    "teacher/t/data/*/logprob/c/0",
    "teacher/t/data/*/topk_ids/c/0/0",
    "teacher/t/data/*/topk_logprob/c/0/0",
    "teacher/t/data/*/topk_rest/c/0",
    "teacher/t/data/*/entropy/c/0",
]
# While shares are at work: training does not read them, `--verify` does.
SHARES = ["shares.json", "teacher/t/shares.json"]


def sound_scores(rng, length):
    """Scores that contradict each other nowhere: the sampled tokens are outside the top-k."""
    top = np.sort(-2 - rng.exponential(size=(length, 4)), axis=-1)[:, ::-1]
    rest = 1 - np.exp(top).sum(-1)
    ids = np.stack([rng.permutation(4) for _ in range(length)]) + 150_000
    logprob = top[:, -1] - 0.1 - rng.exponential(size=length)
    entropy = rng.exponential(size=length).astype(np.float32)
    stored = (logprob.astype(np.float32), ids.astype(np.int32), top.astype(np.float16))
    return Scores(*stored, rest.astype(np.float32), entropy)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A store with two segments and a pass over them, and its snapshot's hash."""
    root = tmp_path_factory.mktemp("sound") / "store"
    rng = np.random.default_rng(0)
    store = create_store(root, {"a": 1})
    with store.writer() as writer:
        for index in range(RECORDS):
            ids = rng.integers(0, 150_000, 30 + 5 * index).astype(np.int32)
            logprob = -rng.exponential(size=len(ids)).astype(np.float32)
            writer.append(Record(f"p{index:02d}", 0, ids[:20], ids, logprob, "stop"))
            if index == RECORDS // 2:
                writer.flush()
    snapshot = store.freeze()
    store.begin_shares(2)
    with store.create_pass("t", {"b": 2}).writer(snapshot) as writer:
        for index, length in enumerate(snapshot.lengths()[1]):
            writer.append(index, sound_scores(rng, int(length)))
    store.settle_shares("t", 2)
    return root, snapshot.hash


@pytest.fixture
def damaged(sound, tmp_path):
    """A copy to damage."""
    shutil.copytree(sound[0], tmp_path / "store")
    return tmp_path / "store", sound[1]


def read_everything(root, snapshot_hash):
    store = open_store(root)
    snapshot = store.open_snapshot(snapshot_hash)
    snapshot.verify()
    scoring = store.open_pass("t")
    scoring.verify(snapshot)
    everything = range(len(snapshot))
    snapshot.read_many(everything)
    scoring.read_many(snapshot, everything)


def files_of(root, kind):
    found = sorted(Path(root).glob(kind))
    assert found, kind
    return found


def test_kinds_cover_every_file(sound):
    root, _ = sound
    covered = {path for kind in (*KINDS, *SHARES) for path in files_of(root, kind)}
    assert covered == {path for path in root.rglob("*") if path.is_file()}
    read_everything(*sound)


def flip_bit(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(raw))


def reported(root):
    """What `--verify` finds wrong."""
    return verify_store(StoreFiles(root)).found.problems


def assert_damage_found(root, snapshot_hash, message=None):
    with pytest.raises(DataError, match=message) as caught:
        read_everything(root, snapshot_hash)
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)
    assert ";" in str(caught.value), "no repair named"


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found(damaged, kind):
    """5 bits of each kind of file: 75 flips."""
    root, snapshot_hash = damaged
    rng = np.random.default_rng(len(kind))
    for _ in range(5):
        path = rng.choice(files_of(root, kind))
        bit = int(rng.integers(8 * path.stat().st_size))
        flip_bit(path, bit)
        assert_damage_found(root, snapshot_hash)
        flip_bit(path, bit)
    read_everything(root, snapshot_hash)


@pytest.mark.parametrize("kind", SHARES)
def test_damage_to_what_shares_agree_on_is_reported(damaged, kind):
    """Every flip and cut, by `--verify`; a share that starts refuses it too."""
    root, _ = damaged
    assert reported(root) == []
    for path, harmed in damages(np.random.default_rng(2), root, kind):
        raw = path.read_bytes()
        path.write_bytes(harmed)
        (problem,) = reported(root)
        assert str(path) in problem
        store = open_store(root)
        to_pass = functools.partial(store.settle_shares, "t")
        join = store.begin_shares if kind == SHARES[0] else to_pass
        with pytest.raises(DataError, match=r"shares\.json"):
            join(2)
        path.write_bytes(raw)


def epoch_of_batches(root, snapshot_hash):
    """Every batch of one epoch, read as training reads them, from a store just opened."""
    store = open_store(root)
    snapshot = store.open_snapshot(snapshot_hash)
    longest = int(sum(snapshot.lengths()).max())
    run = TrainRun(batch_size=4, steps=RECORDS // 4)
    packing = Packing.of(run, longest, ways=1, support=4)
    members = range(len(snapshot))
    source = offline_source(snapshot, store.open_pass("t"), members, run, packing, seed=0)
    next_batch = source.start(0)
    return [next_batch(step, dict) for step in range(RECORDS // 4)]


def damages(rng, root, kind):
    """(file, its bytes with one bit flipped), then (file, its bytes cut short)."""
    files = files_of(root, kind)
    for number in range(FLIPS + CUTS):
        path = files[rng.integers(len(files))]
        raw = bytearray(path.read_bytes())
        if number < FLIPS:
            bit = int(rng.integers(8 * len(raw)))
            raw[bit // 8] ^= 1 << bit % 8
            yield path, bytes(raw)
        else:
            yield path, bytes(raw[: rng.integers(len(raw))])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_overlooked_or_reaches_a_training_batch(damaged, kind):
    """Verification reports each; batches are refused, or those of the sound store to the bit."""
    root, snapshot_hash = damaged
    assert reported(root) == []
    wanted = epoch_of_batches(root, snapshot_hash)
    refused = 0
    for path, harmed in damages(np.random.default_rng(1), root, kind):
        raw = path.read_bytes()
        path.write_bytes(harmed)
        assert reported(root)
        assert_damage_found(root, snapshot_hash)
        try:
            batches = epoch_of_batches(root, snapshot_hash)
        except DataError:
            refused += 1
        else:
            assert_same_batches(batches, wanted)
        path.write_bytes(raw)
    read_everything(root, snapshot_hash)
    print(f"{kind}: {refused} of {FLIPS + CUTS} refused, the others without effect")
    assert refused == (0 if kind.endswith(UNREAD) else FLIPS + CUTS)


def assert_same_batches(actual, wanted):
    assert len(actual) == len(wanted)
    for batch, sound_one in zip(actual, wanted, strict=True):
        assert batch.keys() == sound_one.keys()
        for name, value in batch.items():
            assert np.asarray(value).tobytes() == np.asarray(sound_one[name]).tobytes(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", ["removed", "cut to half", "emptied", "longer"])
def test_missing_and_truncated_files_are_found(damaged, kind, harm):
    root, snapshot_hash = damaged
    path = files_of(root, kind)[-1]
    raw = path.read_bytes()
    path.unlink()
    if harm != "removed":
        path.write_bytes(
            {"cut to half": raw[: len(raw) // 2], "emptied": b""}.get(harm, raw + b"\0")
        )
    if harm == "removed" and kind == "teacher/t/commits/*.json":
        # A commit that is not there is work not done: the restart sees it, and reading says so.
        assert_damage_found(root, snapshot_hash, "no scores|topk")
    else:
        assert_damage_found(root, snapshot_hash)


@pytest.mark.parametrize("kind", ["data/*/response_ids/c/0", "data/*/student_logprob/c/0"])
def test_reading_finds_damage_without_verify(damaged, kind):
    root, snapshot_hash = damaged
    path = files_of(root, kind)[0]
    flip_bit(path, 8 * 40)
    with pytest.raises(DataError, match=r"delete .*commits/w.* and run the stage"):
        open_store(root).open_snapshot(snapshot_hash).read_many(range(RECORDS))


def test_the_named_repair_works(damaged):
    root, snapshot_hash = damaged
    flip_bit(files_of(root, "data/*/records.npz")[0], 77)
    with pytest.raises(DataError) as caught:
        open_store(root).committed_keys()
    commit = Path(str(caught.value).split("delete ")[1].split(" and run")[0])
    commit.unlink()
    store = open_store(root)
    assert 0 < len(store.committed_keys()) < RECORDS
    store.freeze().verify()
    with pytest.raises(DataError, match="file is missing"):
        store.open_snapshot(snapshot_hash)


def test_a_swapped_array_is_not_the_record_written(damaged):
    """Sound checksums, wrong place: only the records' own digests can tell."""
    root, snapshot_hash = damaged
    one, two = files_of(root, "data/*")
    for name in ("response_ids", "student_logprob", "prompt_ids"):
        shutil.rmtree(two / name)
        shutil.copytree(one / name, two / name)
    assert_damage_found(root, snapshot_hash)


@pytest.mark.parametrize("kind", ["dataset.json", "commits/*.json", "snapshots/*.json"])
def test_unknown_schema_versions_are_refused(damaged, kind, monkeypatch):
    root, snapshot_hash = damaged
    path = files_of(root, kind)[0]
    body = json.loads(path.read_bytes())
    del body["sha256"], body["schema_version"]
    monkeypatch.setattr("opd_jax.data.store_files.SCHEMA_VERSION", 2)
    path.write_bytes(encode_document(body))
    monkeypatch.undo()
    assert_damage_found(root, snapshot_hash, "schema version 2, this opd_jax reads 1; install")


def test_a_replaced_segment_is_not_the_frozen_one(damaged):
    root, snapshot_hash = damaged
    path = files_of(root, "commits/*.json")[0]
    body = json.loads(path.read_bytes())
    del body["sha256"]
    path.write_bytes(encode_document({**body, "note": "made again"}))
    assert_damage_found(root, snapshot_hash, "is not the one that was frozen")
