"""Killed with -9 at any moment, a store and its teacher pass lose the open segment and no more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kill_store import KILLS, PASS, RECORDS, same_scores
from processes import LIMIT_SECONDS, quick_environment

from opd_jax.data.store import open_store
from opd_jax.data.store_rows import record_digest


def run_children(action, folder):
    """What `kill_store.py` reports; a child's error is its own."""
    command = [sys.executable, str(Path(__file__).with_name("kill_store.py")), action, str(folder)]
    with (folder / "log.txt").open("w+") as log:
        done = subprocess.run(
            command,
            env=quick_environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    log_text = (folder / "log.txt").read_text()
    assert done.returncode == 0, log_text
    assert "Traceback" not in log_text, log_text
    return json.loads(done.stdout.splitlines()[-1])


def content(root):
    """The snapshot's hash, all digests and all scores; verified."""
    store = open_store(root)
    snapshot = store.freeze()
    snapshot.verify()
    scoring = store.open_pass("t")
    scoring.verify(snapshot)
    digests = [record_digest(record) for record in snapshot.read_many(range(len(snapshot)))]
    return snapshot.hash, digests, scoring.read_many(snapshot, range(len(snapshot)))


def assert_same_content(folder):
    (want_hash, want, want_scores), (got_hash, got, got_scores) = (
        content(folder / name) for name in ("straight", "killed")
    )
    assert len(want) == RECORDS
    assert got_hash == want_hash
    assert got == want
    assert all(same_scores(a, b) for a, b in zip(want_scores, got_scores, strict=True))


@pytest.mark.slow
def test_killed_thirty_times_a_store_and_its_scores_are_those_of_an_undisturbed_run(tmp_path):
    """While a reader reads all there is, again and again, and never meets a bad record."""
    found = run_children("kills", tmp_path)
    left = [*found["writing"], *found["scoring"]]
    for kind in ("writing", "scoring"):
        kept = [kill["records"] for kill in found[kind]]
        assert kept == sorted(set(kept))  # every process committed something before its end
        assert kept[-1] < RECORDS
    torn = sum(kill["orphans"] for kill in left)
    print(f"{len(left)} kills, {torn} left an orphan; {len(found['read'])} readings of everything")
    assert len(left) == 2 * KILLS == 30
    assert all(kill["orphans"] in (0, 1) for kill in left)
    assert torn > 0
    assert len(found["read"]) > 10
    assert found["read"][-1] == 2 * RECORDS
    assert_same_content(tmp_path)


@pytest.mark.slow
def test_two_processes_share_a_store_and_one_of_them_is_killed_and_started_again(tmp_path):
    torn = run_children("pair", tmp_path)
    print(f"segments without a commit after the kill: {torn}")
    assert_same_content(tmp_path)  # a record or score that is there twice is an error
    for base in ("", PASS):
        names = [p.name for p in (tmp_path / "killed" / base / "commits").iterdir()]
        assert {name.split("-")[0] for name in names} == {"w00000", "w00001"}
