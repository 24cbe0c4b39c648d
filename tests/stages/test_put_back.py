"""What `--force` put away comes back when the stage fails before it has written anything."""

import pytest

from opd_jax.stages.records import StageRecords


@pytest.fixture
def pass_dir(tmp_path):
    """An old pass, put away."""
    folder = tmp_path / "teacher" / "t"
    (folder / "commits").mkdir(parents=True)
    (folder / "commits" / "old.json").touch()
    StageRecords(tmp_path).set_aside("score", [folder])
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
