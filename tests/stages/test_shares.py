"""Stages shared out to programs that meet in the store alone, one of which is killed."""

import json
import shutil
import time

import numpy as np
import pytest
from forks import start_run
from processes import LIMIT_SECONDS
from tiny_run import ROOT, arguments

from opd_jax.core.run_lock import file_lock
from opd_jax.data.store import open_store
from opd_jax.data.store_rows import record_digest
from opd_jax.main import main

SETTINGS = ("prompts.opd_limit=48", "score.batch_tokens=32", "score.top_k=4")


def start(run_dir, *more):
    return start_run(arguments(run_dir, *SETTINGS, *more), cwd=ROOT)


def finish(process):
    output = process.communicate(timeout=LIMIT_SECONDS)[0].decode()
    assert process.returncode == 0, output
    return output


def share(run_dir, store, which):
    return start(run_dir, "--stages", "score", "--share", which, f"store={store}")


def commits_of(store, writer):
    return len(list(store.glob(f"rollouts/teacher/*/commits/{writer}-*.json")))


def kill_after_commits(process, store, writer):
    deadline = time.monotonic() + LIMIT_SECONDS
    while commits_of(store, writer) < 2:
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline, "never scored anything"
        time.sleep(0.002)
    process.kill()
    process.communicate()


def scores(root):
    store = open_store(root / "rollouts")
    snapshot = store.freeze()
    (folder,) = (root / "rollouts" / "teacher").iterdir()
    scoring = store.open_pass(folder.name)
    scoring.verify(snapshot)
    return scoring.read_many(snapshot, range(len(snapshot)))


@pytest.fixture(scope="module")
def rolled_out(after_sft, tmp_path_factory):
    """A run folder after `rollout`."""
    run_dir = shutil.copytree(after_sft, tmp_path_factory.mktemp("shares") / "rolled_out")
    finish(start(run_dir, "--stages", "rollout"))
    return run_dir


@pytest.mark.slow
def test_two_shares_make_the_pass_of_one_run_though_one_was_killed(rolled_out, tmp_path):
    """Each has a run folder of its own, that holds the record of the rollouts and nothing else."""
    straight, store = shutil.copytree(rolled_out, tmp_path / "straight"), tmp_path / "store"
    shutil.copytree(straight / "rollouts", store / "rollouts")
    finish(start(straight, "--stages", "score"))
    first, second = tmp_path / "first", tmp_path / "second"
    for run_dir in (first, second):
        (run_dir / "stages").mkdir(parents=True)
        shutil.copy(straight / "stages" / "rollout.json", run_dir / "stages")
    kill_after_commits(share(second, store, "2/2"), store, "w00001")
    one = share(first, store, "1/2")
    before = commits_of(store, "w00001")
    finish(share(second, store, "2/2"))
    finish(one)
    assert 0 < before < commits_of(store, "w00001")
    assert commits_of(store, "w00000") > 2
    want, got = scores(straight), scores(store)
    assert len(want) == len(got) == 48
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a.logprob, b.logprob)
        np.testing.assert_array_equal(a.topk_ids, b.topk_ids)
        np.testing.assert_array_equal(a.topk_logprob, b.topk_logprob)
    records = [run_dir / "stages" / "score.json" for run_dir in (first, second)]
    done = [json.loads(record.read_text()) for record in records if record.exists()]
    assert done  # by the one that was last
    wanted = json.loads((straight / "stages" / "score.json").read_text())
    assert done[0]["outputs"] == wanted["outputs"]
    assert done[0]["counts"] == wanted["counts"]


@pytest.mark.slow
def test_shares_in_one_run_folder_add_up_to_the_cost_of_the_stage(rolled_out, tmp_path):
    run_dir = shutil.copytree(rolled_out, tmp_path / "run")
    first = share(run_dir, run_dir, "1/2")
    second = share(run_dir, run_dir, "2/2")
    outputs = [finish(process) for process in (first, second)]
    assert sum("this share is done" in output for output in outputs) <= 1
    record = json.loads((run_dir / "stages" / "score.json").read_text())
    assert record["counts"]["records"] == 48
    assert record["seconds"] <= record["device_seconds"] < 2.001 * record["seconds"]
    assert "done before" in finish(start(run_dir, "--stages", "score"))


def digests(root):
    snapshot = open_store(root).freeze()
    records = snapshot.read_many(range(len(snapshot)))
    return {(r.prompt_id, r.sample_index): record_digest(r) for r in records}


def writers(root):
    """How many segments each writer has committed."""
    names = [path.name.split("-")[0] for path in (root / "commits").glob("*.json")]
    return {name: names.count(name) for name in names}


def answers(run_dir, *more):
    return arguments(run_dir, "prompts.sft_limit=9", "--stages", "answer", *more)


def record_of_stage(run_dir):
    return json.loads((run_dir / "stages" / "answer.json").read_text())


def test_the_last_share_of_the_answers_freezes_them(tmp_path, capsys, instant):
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    assert main(answers(straight)) == 0
    capsys.readouterr()
    assert main(answers(run_dir, "--share", "2/2")) == 0
    assert "this share is done, others are not" in capsys.readouterr().out
    assert not (run_dir / "stages" / "answer.json").exists()
    assert writers(run_dir / "answers") == {"w00001": 2}
    assert main(["--verify", str(run_dir / "answers")]) == 0
    assert "no part of the store" not in capsys.readouterr().out
    assert main(answers(run_dir, "--share", "1/2")) == 0
    assert writers(run_dir / "answers") == {"w00000": 2, "w00001": 2}
    want, got = (record_of_stage(folder) for folder in (straight, run_dir))
    for part in ("inputs", "outputs", "counts"):
        assert got[part] == want[part]
    assert digests(run_dir / "answers") == digests(straight / "answers")
    assert not (run_dir / "answers" / "shares.json").exists()
    assert main(answers(run_dir, "--share", "2/2")) == 0
    assert "done before" in capsys.readouterr().out


def test_shares_of_another_number_and_a_share_twice_are_refused(tmp_path, capsys, instant):
    """From one run folder or from another."""
    words = (f"store={tmp_path / 'store'}", "--share")
    assert main(answers(tmp_path / "one", *words, "1/2")) == 0
    document = tmp_path / "store" / "answers" / "shares.json"
    capsys.readouterr()
    for name in ("one", "two"):
        assert main(answers(tmp_path / name, *words, "2/3")) == 2
        assert capsys.readouterr().err == (
            f"opd_jax: error: {document}: 2 shares are under way, this is one of 3: both would "
            "write the same records; start I/2, or delete that file once none of them runs any "
            "more\n"
        )
    lock = tmp_path / "store" / ".answer.share-2-of-2.lock"
    with file_lock(lock, "the share", "wait"):
        assert main(answers(tmp_path / "two", *words, "2/2")) == 2
        assert "answer.share-2-of-2 in" in capsys.readouterr().err
    assert main(answers(tmp_path / "two", *words, "2/2")) == 0
    assert not document.exists()


@pytest.mark.slow
def test_two_shares_sample_the_rollouts_of_one_run_though_one_was_killed(after_sft, tmp_path):
    """Each has a run folder of its own, that holds what the rollouts depend on."""
    straight, store = shutil.copytree(after_sft, tmp_path / "straight"), tmp_path / "store"
    words = ("rollout.samples_per_prompt=2",)
    folders = [
        shutil.copytree(straight, tmp_path / name, ignore=shutil.ignore_patterns("answers"))
        for name in ("first", "second")
    ]
    finish(start(straight, *words, "--stages", "rollout"))

    def part(number):
        share = ("--share", f"{number}/2", f"store={store}")
        return start(folders[number - 1], *words, "--stages", "rollout", *share)

    root, second, deadline = store / "rollouts", part(2), time.monotonic() + LIMIT_SECONDS
    while writers(root).get("w00001", 0) < 2:
        assert second.poll() is None, second.communicate()[0].decode()
        assert time.monotonic() < deadline, "never sampled anything"
        time.sleep(0.002)
    second.kill()
    second.communicate()
    before, one = writers(root), part(1)
    finish(part(2))
    finish(one)
    after = writers(root)
    assert before["w00001"] < after["w00001"]
    assert after["w00000"] > 2
    want = digests(straight / "rollouts")
    assert len(want) == 96
    assert digests(root) == want
    assert main(["--verify", str(root)]) == 0
    assert not (root / "shares.json").exists()
    records = [folder / "stages" / "rollout.json" for folder in folders]
    done = [json.loads(record.read_text()) for record in records if record.exists()]
    wanted = json.loads((straight / "stages" / "rollout.json").read_text())
    assert done  # by the one that was last, or by both
    for part_of in ("inputs", "outputs", "counts"):
        assert all(record[part_of] == wanted[part_of] for record in done)
