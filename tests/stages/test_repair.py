"""What a message says to do about damage is done, and the same command ends with the same bits."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_run import arguments

from opd_jax.data.store import open_store
from opd_jax.data.store_rows import record_digest
from opd_jax.main import main

RUN = (
    *("train.enabled=[opd]", "evaluate.samples_per_prompt=1"),
    *("evaluate.base=false", "evaluate.teacher=false"),
)


def flip_one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def damage(root, pattern):
    """Flip one bit of the first array that a pattern names; returns its segment's commit."""
    array = min(root.glob(f"data/*/{pattern}/c/*"))
    flip_one_bit(array if array.is_file() else next(array.iterdir()))
    return root / "commits" / f"{array.parents[2].name}.json"


def follow(message):
    """Do what a message about damage says, short of running the stage again."""
    (commit,) = re.findall(r"; delete (\S+\.json) and run the stage that wrote it again", message)
    Path(commit).unlink()
    return Path(commit)


def digests(root):
    snapshot = open_store(root).freeze()
    records = snapshot.read_many(range(len(snapshot)))
    return {(r.prompt_id, r.sample_index): record_digest(r) for r in records}


def outputs(run_dir, stage):
    return json.loads((run_dir / "stages" / f"{stage}.json").read_text())["outputs"]


def lines_of(capsys, flag, root, code):
    assert main([flag, str(root)]) == code
    return capsys.readouterr().out.splitlines()


def made_good(run_dir, words, capsys):
    """Damage answers, do what `--verify` says, and run the stage again."""
    root = run_dir / "answers"
    assert main(words) == 0
    want, said, seconds = digests(root), outputs(run_dir, "answer"), cost(run_dir)
    expected = damage(root, "response_ids")
    capsys.readouterr()
    assert follow(lines_of(capsys, "--verify", root, 3)[0]) == expected
    assert main([*words, "--plan"]) == 0
    assert re.search(r"pending \([1-7] of 8 records are missing\)", capsys.readouterr().out)
    assert main(words) == 0
    told = capsys.readouterr().out
    assert re.search(r"done before, but [1-7] of 8 records are missing: making it good", told)
    assert digests(root) == want
    assert outputs(run_dir, "answer") == said
    assert cost(run_dir) > seconds
    assert lines_of(capsys, "--verify", root, 0)[-1].startswith("sound    ")
    assert main(words) == 0
    assert "done before, in" in capsys.readouterr().out


ANSWERS = ("prompts.sft_limit=8", "answer.slots=4", "sft.batch_size=4", "--stages", "answer")


def test_a_finished_stage_makes_good_what_has_gone(tmp_path, capsys, instant):
    made_good(tmp_path, arguments(tmp_path, *ANSWERS), capsys)


@pytest.mark.slow
def test_answers_that_are_sampled_again_have_the_same_bits(tmp_path, capsys):
    made_good(tmp_path, arguments(tmp_path, *ANSWERS), capsys)


def cost(run_dir):
    return json.loads((run_dir / "stages" / "answer.json").read_text())["seconds"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run; tests damage copies of it."""
    run_dir = tmp_path_factory.mktemp("repair") / "run"
    assert main(arguments(run_dir, *RUN)) == 0
    return run_dir


def made(run_dir):
    """All that must come out the same: records, and the exported parameters."""
    stores = {name: digests(run_dir / name) for name in ("answers", "rollouts")}
    return stores, (run_dir / "export" / "opd" / "model.safetensors").read_bytes()


def scores_of(run_dir):
    store = open_store(run_dir / "rollouts")
    snapshot = store.open_snapshot(outputs(run_dir, "rollout")["snapshot"])
    scores = store.open_pass(outputs(run_dir, "score")["pass"])
    rows = scores.read_many(snapshot, range(len(snapshot)))
    return [(s.logprob.tobytes(), s.topk_ids.tobytes(), s.topk_logprob.tobytes()) for s in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "array", "reader", "gaps"),
    [
        ("answers", "response_ids", "sft", ["are missing"]),
        ("rollouts", "response_ids", "train.opd", ["are missing", "have no scores"]),
        ("rollouts", "student_logprob", "train.opd", ["are missing", "have no scores"]),
        ("rollouts/teacher/*", "logprob", "train.opd", ["have no scores"]),
    ],
)
def test_a_stage_that_meets_damage_says_what_makes_the_run_whole(
    finished, tmp_path, capsys, folder, array, reader, gaps
):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    name = reader.removeprefix("train.")
    shutil.rmtree(run_dir / "checkpoints" / name)
    (run_dir / "stages" / f"{reader}.json").unlink()
    (root,) = run_dir.glob(folder)
    expected = damage(root, array)
    capsys.readouterr()
    words = arguments(run_dir, *RUN)
    assert main(words) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert follow(message) == expected
    assert main(words) == 0
    told = capsys.readouterr().out
    found = re.findall(r"done before, but \d+ of \d+ records (.*): making it good", told)
    assert found == gaps
    assert made(run_dir) == made(finished)
    assert scores_of(run_dir) == scores_of(finished)
    for store in ("answers", "rollouts"):
        lines = lines_of(capsys, "--verify", run_dir / store, 0)
        assert lines[-1].startswith("sound    ")
    assert main(words) == 0
    assert "making it good" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_snapshot_that_is_damaged_is_frozen_again(finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    (snapshot,) = (run_dir / "rollouts" / "snapshots").iterdir()
    before = snapshot.read_bytes()
    flip_one_bit(snapshot)
    capsys.readouterr()
    assert main(arguments(run_dir, *RUN)) == 0
    told = capsys.readouterr().out
    assert "done before, but their snapshot is missing or of other segments" in told
    assert snapshot.read_bytes() == before


@pytest.mark.slow
def test_evaluation_samples_are_made_good(finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    said = outputs(run_dir, "evaluate.opd")
    damage(run_dir / "evaluate" / "opd" / "sampled", "response_ids").unlink()
    damage(run_dir / "evaluate" / "opd" / "greedy", "response_ids").unlink()
    assert main(arguments(run_dir, *RUN)) == 0
    assert outputs(run_dir, "evaluate.opd") == said
    for name in ("sampled", "greedy"):
        assert main(["--verify", str(run_dir / "evaluate" / "opd" / name)]) == 0
