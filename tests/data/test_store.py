"""The store keeps what it is given, whoever wrote it and however it was cut into segments."""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import interrupt_commits

from opd_jax.data.records import Record
from opd_jax.data.store import create_store, open_store
from opd_jax.data.store_arrays import choose_chunk, place_rows
from opd_jax.errors import DataError

META = {"tokenizer": "abc", "schema": [1, 2]}
TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40)


def make_record(prompt_id, sample_index=0, prompt=5, response=9):
    rng = np.random.default_rng([sample_index, prompt, response, *prompt_id.encode()])
    return Record(
        prompt_id,
        sample_index,
        rng.integers(0, 150_000, prompt).astype(np.int32),
        rng.integers(0, 150_000, response).astype(np.int32),
        -rng.exponential(size=response).astype(np.float32),
        "length" if response % 2 else "stop",
        float(rng.integers(2)),
    )


def assert_same(actual, wanted):
    assert actual.prompt_id == wanted.prompt_id
    assert actual.sample_index == wanted.sample_index
    assert actual.finish_reason == wanted.finish_reason
    np.testing.assert_equal(actual.reward, wanted.reward)
    for name in ("prompt_ids", "response_ids", "student_logprob"):
        value, expected = getattr(actual, name), getattr(wanted, name)
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)


def write_all(store, records, flush_every=10_000, process_index=0):
    with store.writer(process_index) as writer:
        for index, record in enumerate(records, 1):
            writer.append(record)
            if index % flush_every == 0:
                writer.flush()


@st.composite
def stored_records(draw):
    keys = draw(
        st.lists(
            st.tuples(st.text(max_size=6), st.integers(0, 2**40)),
            min_size=1,
            max_size=8,
            unique=True,
        )
    )
    records = []
    for prompt_id, sample in keys:
        response = draw(TOKENS)
        floats = st.lists(st.floats(width=32), min_size=len(response), max_size=len(response))
        records.append(
            Record(
                prompt_id,
                sample,
                np.array(draw(TOKENS), np.int32),
                np.array(response, np.int32),
                np.array(draw(floats), np.float32),
                draw(st.sampled_from(["stop", "length"])),
                draw(st.floats()),
            )
        )
    return records


@settings(max_examples=25)
@given(stored_records(), st.integers(1, 4))
def test_what_is_written_is_read(records, flush_every):
    with tempfile.TemporaryDirectory() as folder:
        write_all(create_store(folder, META), records, flush_every)
        store = open_store(folder)
        assert store.meta == META
        wanted = sorted(records, key=lambda r: (r.prompt_id, r.sample_index))
        assert store.committed_keys() == {(r.prompt_id, r.sample_index) for r in records}
        snapshot = store.freeze()
        assert snapshot.keys == [(r.prompt_id, r.sample_index) for r in wanted]
        for actual, expected in zip(snapshot.read_many(range(len(wanted))), wanted, strict=True):
            assert_same(actual, expected)
        prompt_len, response_len = snapshot.lengths()
        assert prompt_len.tolist() == [len(r.prompt_ids) for r in wanted]
        assert response_len.tolist() == [len(r.response_ids) for r in wanted]
        snapshot.verify()


def test_long_records_are_read_without_being_kept_whole(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, 5_000_000).astype(np.int32)
    long = Record("long", 0, ids[:300], ids, ids.astype(np.float32), "stop")
    store = create_store(tmp_path, META)
    write_all(store, [make_record("a"), long, make_record("z")])
    read = store.freeze().read_many([2, 1, 1, 0])
    for actual, wanted in zip(read, [make_record("z"), long, long, make_record("a")], strict=True):
        assert_same(actual, wanted)


def test_read_rows_belong_to_the_caller(tmp_path):
    store = create_store(tmp_path, META)
    write_all(store, [make_record("a")])
    snapshot = store.freeze()
    snapshot.read_many([0])[0].response_ids[:] = 0
    assert_same(snapshot.read_many([0])[0], make_record("a"))


def test_writer_copies_what_it_buffers(tmp_path):
    store, buffer = create_store(tmp_path, META), np.arange(4, dtype=np.int32)
    with store.writer() as writer:
        writer.append(Record("a", 0, buffer, buffer, np.zeros(4, np.float32), "stop"))
        buffer[:] = -5
    assert store.freeze().read_many([0])[0].response_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("index", [-1, 3])
def test_index_outside_the_snapshot_is_refused(tmp_path, index):
    store = create_store(tmp_path, META)
    write_all(store, [make_record(p) for p in "abc"])
    with pytest.raises(IndexError, match="snapshot of 3"):
        store.freeze().read_many([0, index])


def test_snapshot_does_not_show_who_wrote_what_when(tmp_path):
    records = [make_record(f"p{i}", s) for i in range(12) for s in range(2)]
    hashes, orders = set(), []
    for trial in range(4):
        shuffled = [records[i] for i in np.random.default_rng(trial).permutation(len(records))]
        store = create_store(tmp_path / str(trial), META)
        cut = 5 * trial
        write_all(store, shuffled[:cut], flush_every=trial + 1, process_index=1)
        write_all(store, shuffled[cut:], flush_every=7 - trial, process_index=0)
        snapshot = store.freeze()
        hashes.add(snapshot.hash)
        orders.append([r.response_ids.tolist() for r in snapshot.read_many(range(24))])
    assert len(hashes) == 1
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize(
    "change",
    [
        {"sample_index": 1},
        {"prompt_id": "b"},
        {"reward": 0.5},
        {"finish_reason": "stop"},
        {"student_logprob": np.full(9, -1, np.float32)},
        {"response_ids": np.arange(9, dtype=np.int32)},
        {"prompt_ids": np.arange(5, dtype=np.int32)},
    ],
)
def test_snapshot_hash_names_the_content(tmp_path, change):
    hashes = set()
    for name, record in [
        ("a", make_record("a")),
        ("b", dataclasses.replace(make_record("a"), **change)),
    ]:
        store = create_store(tmp_path / name, META)
        write_all(store, [record])
        hashes.add(store.freeze().hash)
    assert len(hashes) == 2


def test_freezing_again_gives_the_same_snapshot_and_old_ones_stay(tmp_path):
    store = create_store(tmp_path, META)
    write_all(store, [make_record("b")])
    first = store.freeze()
    assert store.freeze().hash == first.hash
    write_all(store, [make_record("a")])
    assert len(store.freeze()) == 2
    assert len(open_store(tmp_path).open_snapshot(first.hash)) == 1


def test_two_writers_with_the_same_record_are_refused_at_freeze(tmp_path):
    store = create_store(tmp_path, META)
    write_all(store, [make_record("a"), make_record("b")], process_index=0)
    write_all(store, [make_record("c"), make_record("b")], process_index=1)
    with pytest.raises(
        DataError, match=r"'b', sample 0 was committed twice.*delete commits/w00001"
    ):
        store.freeze()


def test_one_writer_refuses_a_record_twice(tmp_path):
    with create_store(tmp_path, META).writer() as writer:
        writer.append(make_record("a"))
        writer.flush()
        with pytest.raises(DataError, match="appended twice"):
            writer.append(make_record("a"))


def test_two_writers_of_one_process_index_do_not_collide(tmp_path):
    store = create_store(tmp_path, META)
    with store.writer() as one, store.writer() as two:
        for index in range(6):
            (one if index % 2 else two).append(make_record(f"p{index}"))
    assert len(store.freeze()) == 6


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_commit_is_there_once(tmp_path, monkeypatch, moment):
    store = create_store(tmp_path, META)
    interrupt_commits(monkeypatch, moment)
    with pytest.raises(KeyboardInterrupt):
        write_all(store, [make_record(f"p{index}") for index in range(3)], flush_every=3)
    assert len(store.freeze()) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logprob": np.zeros(8, np.float32)}, "8 student_logprob for 9 response tokens"),
        ({"finish_reason": "eos"}, "finish_reason 'eos'"),
        ({"response_ids": np.zeros((9, 1), np.int32)}, "rank 1"),
        ({"prompt_ids": np.zeros(3, np.float32)}, "prompt_ids"),
        ({"prompt_ids": np.array([2**31])}, "does not fit int32"),
        ({"student_logprob": np.zeros(9, np.int32)}, "student_logprob"),
    ],
)
def test_impossible_records_are_refused_and_the_others_kept(tmp_path, change, message):
    store = create_store(tmp_path, META)
    with store.writer() as writer:
        writer.append(make_record("good"))
        with pytest.raises(DataError, match=message):
            writer.append(dataclasses.replace(make_record("bad"), **change))
    assert store.committed_keys() == {("good", 0)}


def test_creating_again_opens_the_same_store_and_refuses_another(tmp_path):
    write_all(create_store(tmp_path, META), [make_record("a")])
    assert create_store(tmp_path, META).committed_keys() == {("a", 0)}
    with pytest.raises(DataError, match=r"dataset.json: 'tokenizer' is 'abc', this run has 'xyz'"):
        create_store(tmp_path, {**META, "tokenizer": "xyz"})
    with pytest.raises(DataError, match="'extra'"):
        create_store(tmp_path, {**META, "extra": 1})


def test_missing_store_and_empty_store_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"nowhere/dataset.json: file is missing.*run the stage"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(DataError, match="nothing is committed"):
        create_store(tmp_path / "empty", META).freeze()


def test_root_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError) as caught:
        create_store(tmp_path / "file", META)
    assert "\n" not in str(caught.value)


def test_url_root(tmp_path):
    store = create_store(f"file://{tmp_path}/s", META)
    write_all(store, [make_record("a")])
    assert_same(open_store(tmp_path / "s").freeze().read_many([0])[0], make_record("a"))


WRITER = textwrap.dedent(
    """
    import sys, numpy as np
    from opd_jax.data.records import Record
    from opd_jax.data.store import open_store
    store = open_store(sys.argv[1])
    done = store.committed_keys()
    writer = store.writer()
    for index in range(800):
        if (f"p{index:03d}", 0) in done:
            continue
        ids = np.full(20, index, np.int32)
        writer.append(Record(f"p{index:03d}", 0, ids, ids, ids.astype(np.float32), "stop"))
        if index % 4 == 3:
            writer.flush()
            print(index, flush=True)
    writer.close()
    """
)


def start_writer(root):
    command = [sys.executable, "-c", WRITER, str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_kill_9_loses_the_open_segment_only_and_a_restart_goes_on(tmp_path):
    create_store(tmp_path, META)
    writer = start_writer(tmp_path)
    for line in writer.stdout:
        if int(line) >= 11:
            break
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    done = open_store(tmp_path).committed_keys()
    assert {(f"p{i:03d}", 0) for i in range(12)} <= done
    assert len(done) % 4 == 0
    assert len(done) < 800
    open_store(tmp_path).freeze().verify()
    start_writer(tmp_path).communicate()
    snapshot = open_store(tmp_path).freeze()
    assert [r.response_ids[0] for r in snapshot.read_many(range(len(snapshot)))] == [*range(800)]


@pytest.mark.parametrize("remains", ["arrays", "half an array", "all but the commit"])
def test_orphan_segments_are_not_listed(tmp_path, remains):
    store = create_store(tmp_path, META)
    write_all(store, [make_record("a")])
    write_all(store, [make_record("b")])
    orphan = sorted((tmp_path / "commits").iterdir())[1]
    orphan.unlink()
    segment = tmp_path / "data" / orphan.stem
    if remains != "all but the commit":
        (segment / "records.npz").unlink()
    if remains == "half an array":
        (segment / "response_ids/zarr.json").unlink()
    store = open_store(tmp_path)
    assert store.committed_keys() == {("a", 0)}
    write_all(store, [make_record("b")])
    store.freeze().verify()


@pytest.mark.parametrize(
    ("lengths", "longest", "chunk"),
    [
        ([], 4096, 16),
        ([0], 4096, 16),
        ([16], 4096, 16),
        ([17], 4096, 32),
        ([80, 80, 80, 300], 4096, 128),
        ([8, 8, 8, 8000], 4096, 512),
        ([9000], 4096, 4096),
        ([9000], 256, 256),
    ],
)
def test_inner_chunk_follows_the_median_record(lengths, longest, chunk):
    assert choose_chunk(np.array(lengths, np.int64), longest) == chunk


@given(st.lists(st.integers(0, 100)), st.sampled_from([16, 32, 64]))
def test_records_start_on_chunk_borders_and_do_not_overlap(lengths, chunk):
    starts, total = place_rows(np.array(lengths, np.int64), chunk)
    assert len(starts) == len(lengths)
    assert all(start % chunk == 0 for start in starts)
    ends = [*starts[1:], total] if lengths else []
    for start, length, end in zip(starts, lengths, ends, strict=True):
        assert 0 <= end - (start + length) < chunk


SMALL_FILES = """
import resource, sys
import numpy as np
from opd_jax.data.records import Record
from opd_jax.data.store import create_store
from opd_jax.errors import DataError

store = create_store(sys.argv[1], {})
noise = np.random.default_rng(0).random(40_000).astype(np.float32)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
writer = store.writer()
writer.append(Record("p", 0, np.arange(3), np.arange(len(noise)), -noise, "stop"))
try:
    writer.flush()
except DataError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_one_line_and_commits_nothing(tmp_path):
    """Files may not grow beyond some bytes, as on a full disk; at first none is that large."""
    sound = tmp_path / "sound"
    say = [run_python(SMALL_FILES, sound, 10_000_000)]
    assert say == [""]
    assert len(open_store(sound).committed_keys()) == 1
    full = tmp_path / "full"
    line = run_python(SMALL_FILES, full, 50_000)
    assert "cannot be written" in line
    assert line.endswith("free space or choose another folder\n")
    assert line.count("\n") == 1
    assert open_store(full).committed_keys() == set()


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
