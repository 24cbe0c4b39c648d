"""What `--force` put away comes back when the stage fails before it has written anything."""

import pytest

from opd_jax.stages.records import StageRecords


@pytest.fixture
def pass_dir(tmp_path):
    """An old pass, put away."""
    folder = tmp_path / "teacher" / "t"
    (folder / "commits").mkdir(parents=True)
    (folder / "commits" / "old.json").touch()
    StageRecords(tmp_path).set_aside("score", [folder], {})
    assert not folder.exists()
    return folder


@pytest.mark.parametrize("begun", [(), ("pass.json",), ("pass.json", "data/w/records.npz")])
def test_a_pass_without_a_commit_gives_way_to_the_old_one(tmp_path, pass_dir, begun):
    for name in begun:
        (pass_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (pass_dir / name).touch()
    StageRecords(tmp_path).put_back("score", [pass_dir])
    assert [path.name for path in pass_dir.rglob("*")] == ["commits", "old.json"]


@pytest.mark.parametrize("written", [("pass.json", "commits/new.json"), ("samples.jsonl",)])
def test_what_is_committed_stays(tmp_path, pass_dir, written):
    for name in written:
        (pass_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (pass_dir / name).touch()
    StageRecords(tmp_path).put_back("score", [pass_dir])
    assert (pass_dir / written[-1]).is_file()
    assert not (pass_dir / "commits" / "old.json").exists()


def test_a_redo_that_was_cut_short_goes_on_and_the_complete_one_is_kept(tmp_path):
    folder, inputs = tmp_path / "opd", {"rate": 1.0, "of": [1, 2]}

    def command(*names):
        records = StageRecords(tmp_path)
        records.redo(names)
        return records, records.is_redone("train.opd", inputs, names)

    def write(text):
        folder.mkdir()
        (folder / "state").write_text(text)

    write("complete")
    records, begun = command("sft", "train.opd")
    assert not begun
    records.set_aside("train.opd", [folder], inputs)
    write("half a try")
    records, begun = command("sft", "train.opd")
    assert begun
    assert not records.is_redone("train.opd", {**inputs, "rate": 2.0}, ["sft", "train.opd"])
    records.set_aside("train.opd", [folder], {**inputs, "rate": 2.0})  # the half is of no use
    records.put_back("train.opd", [folder])
    assert (folder / "state").read_text() == "complete"
    assert not command("sft", "train.opd")[1]
    records.set_aside("train.opd", [folder], inputs)
    assert command("sft", "train.opd")[1]
    assert not command("train.opd")[1]  # another command
    records.set_aside("train.opd", [folder], inputs)
    command()  # one that redoes nothing, as for the report
    records, begun = command("train.opd")
    assert begun
    records.all_redone(["train.opd"])
    assert not command("train.opd")[1]


def test_what_is_complete_is_put_aside_though_the_one_before_is_still_there(tmp_path):
    """A kill between a stage's record and the removal of what it had replaced."""
    folder, records = tmp_path / "opd", StageRecords(tmp_path)
    for text in ("older", "newer"):
        folder.mkdir()
        (folder / "model").write_text(text)
        records.finish("train.opd", {"inputs": {}, "seconds": text})
        records.set_aside("train.opd", [folder], {})
    records.put_back("train.opd", [folder])
    assert (folder / "model").read_text() == "newer"
    assert records.done("train.opd")["seconds"] == "newer"


def test_after_an_error_the_same_command_redoes_the_stage(tmp_path):
    records = StageRecords(tmp_path)
    records.redo(["rollout"])
    records.set_aside("rollout", [], {})
    assert records.is_redone("rollout", {}, ["rollout"])
    records.forget_begun("rollout")
    assert not records.is_redone("rollout", {}, ["rollout"])
