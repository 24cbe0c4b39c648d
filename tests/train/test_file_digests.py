"""Processes digest a checkpoint's files together: each file once, and all of them or none."""

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.core import distributed
from opd_jax.errors import DataError
from opd_jax.train import checkpoint, file_digests


@pytest.fixture
def together(monkeypatch):
    """Runs a function as so many processes, which are threads; returns what each returned."""
    here, slots = threading.local(), {}

    def run(count, function):
        meet = threading.Barrier(count, timeout=60)

        def everyones(x):
            slots[here.rank] = np.asarray(x)
            meet.wait()
            found = np.stack([slots[rank] for rank in range(count)])
            meet.wait()
            return found

        def ranked(rank):
            here.rank = rank
            try:
                return function()
            except (OSError, DataError) as error:
                return error
            except BaseException as error:  # as if it had died
                meet.abort()
                return error

        utils = file_digests.multihost_utils
        with monkeypatch.context() as patch, ThreadPoolExecutor(count) as pool:
            patch.setattr(jax, "process_count", lambda: count)
            patch.setattr(jax, "process_index", lambda: here.rank)
            patch.setattr(utils, "process_allgather", everyones)
            patch.setattr(utils, "broadcast_one_to_all", lambda x: everyones(x)[0])
            patch.setattr(utils, "sync_global_devices", lambda _name: meet.wait())
            return list(pool.map(ranked, range(count)))

    run.here = here
    return run


@pytest.fixture
def read(monkeypatch, together):
    """(rank, file name) of every digest that is made."""
    found, digest = [], file_digests.sha256_of

    def watched(path):
        found.append((together.here.rank, path.name))
        return digest(path)

    monkeypatch.setattr(file_digests, "sha256_of", watched)
    return found


def written(folder, count):
    """So many files, and their digests."""
    (folder / "state").mkdir()
    paths = [folder / ("state" if i % 2 else ".") / f"{i}" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(b"x" * i)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


@pytest.mark.parametrize(("processes", "files"), [(1, 5), (2, 5), (3, 9), (4, 2), (3, 0)])
def test_each_file_is_read_once_and_by_all_in_turn(together, read, tmp_path, processes, files):
    want = written(tmp_path, files)
    found = together(processes, lambda: file_digests.file_digests(tmp_path))
    assert found == [want] * processes
    assert list(found[0]) == sorted(want)
    shares = {name: rank for rank, name in read}
    assert len(read) == len(shares) == files
    names = [name.split("/")[-1] for name in sorted(want)]
    assert [shares[name] for name in names] == [i % processes for i in range(files)]


def test_one_that_cannot_read_its_share_stops_all(together, tmp_path, monkeypatch):
    written(tmp_path, 4)
    digest = file_digests.sha256_of

    def failing(path):
        if together.here.rank == 1:
            raise OSError(5, "Input/output error")
        return digest(path)

    monkeypatch.setattr(file_digests, "sha256_of", failing)
    found = together(3, lambda: file_digests.file_digests(tmp_path))
    assert isinstance(found[1], OSError)
    for error in (found[0], found[2]):
        assert isinstance(error, DataError)
        told = "process 1 could not read back its share (Input/output error)"
        assert str(error) == f"{tmp_path}: {told}"
        assert error.__cause__.errno == 5  # by which a launcher starts all of them again


def test_a_file_that_one_sees_late_is_waited_for(together, read, tmp_path, monkeypatch):
    want, names, looks = written(tmp_path, 5), file_digests._names, []

    def late(folder):
        looks.append(together.here.rank)
        hidden = together.here.rank == 1 and looks.count(1) < 4
        return names(folder)[hidden:]

    monkeypatch.setattr(distributed, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(file_digests, "_names", late)
    assert together(2, lambda: file_digests.file_digests(tmp_path)) == [want] * 2
    assert looks.count(1) == 4
    assert len(read) == 5


def begun(directory, step):
    """A save whose arrays are written."""
    save = checkpoint._Save(directory, step, {"x": jnp.full(8, float(step))}, {}, None)
    save._response.result()
    return save


def test_a_step_is_complete_with_the_digests_of_all_shares(together, read, tmp_path):
    save = begun(tmp_path, 1)
    assert together(3, save.complete) == [None] * 3
    document = json.loads((tmp_path / "00000001/complete.json").read_text())
    paths = {path for path in tmp_path.rglob("*") if path.is_file()}
    listed = {tmp_path / "00000001" / name: digest for name, digest in document["files"].items()}
    assert listed.keys() == paths - {tmp_path / "00000001/complete.json"}
    for path, digest in listed.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert len(read) == len(listed) > 5
    assert {rank for rank, _ in read} == {0, 1, 2}


def test_who_dies_over_its_share_leaves_no_step_and_nothing_in_the_way(
    together, tmp_path, monkeypatch
):
    begun(tmp_path, 1).complete()
    save, digest = begun(tmp_path, 2), file_digests.sha256_of
    before = sorted(tmp_path.rglob("*"))

    def dies(path):
        if together.here.rank == 1:
            raise KeyboardInterrupt
        return digest(path)

    with monkeypatch.context() as patch:
        patch.setattr(file_digests, "sha256_of", dies)
        found = together(2, save.complete)
    # Not "cannot be written": what a collective raises is another process's end.
    assert [type(error) for error in found] == [threading.BrokenBarrierError, KeyboardInterrupt]
    assert checkpoint.complete_steps(tmp_path) == [1]
    assert sorted(tmp_path.rglob("*")) == before
    assert together(2, begun(tmp_path, 2).complete) == [None] * 2
    abstract = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jnp.zeros(8).sharding)}
    restored, _, step = checkpoint.restore(tmp_path, None, abstract)
    assert (step, restored["x"][0]) == (2, 2)
