"""A run whose token stores lie on an object store is the run it would be in its folder."""

import json

import pytest
from tiny_run import arguments

from opd_jax.data.store_files import StoreFiles
from opd_jax.main import main
from opd_jax.stages.records import StageRecords, exists

SMALL = ("train.enabled=[opd]", "evaluate.base=false", "evaluate.teacher=false")


def outputs(run_dir, stage):
    return json.loads((run_dir / "stages" / f"{stage}.json").read_text())["outputs"]


def model_bytes(run_dir):
    return (run_dir / "export" / "opd" / "model.safetensors").read_bytes()


def keys(root):
    return {key.decode() for key in StoreFiles(root).kvstore.list().result()}


@pytest.mark.slow
def test_a_run_on_s3_is_the_local_run_and_its_stages_can_be_redone(bucket, tmp_path, capsys):
    local, far, root = tmp_path / "local", tmp_path / "far", f"{bucket}/mine"
    assert main(arguments(local, *SMALL)) == 0
    words = arguments(far, *SMALL, f"store={root}")
    assert main(words) == 0
    assert not list(far.rglob("commits"))
    for stage in ("answer", "rollout", "score", "train.opd", "evaluate.opd"):
        want, got = outputs(local, stage), outputs(far, stage)
        for key in ("snapshot", "pass", "model", "rollouts", "eval", "reverse_kl"):
            assert got.get(key) == want.get(key), (stage, key)
    assert model_bytes(far) == model_bytes(local)
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.count("done before") == 8
    before = keys(root)
    assert main([*words, "--force", "score,evaluate.sft", "--stages", "score,evaluate.sft"]) == 0
    assert outputs(far, "score") == outputs(local, "score")
    after = keys(root)
    redone = ("rollouts/teacher/", "evaluate/sft/")
    assert {key for key in before ^ after if not key.startswith(redone)} == set()
    for folder in redone:  # segments have new names: nothing of the old ones is left
        old, new = (
            {k for k in side if k.startswith(folder) and "/commits/" in k}
            for side in (before, after)
        )
        assert old
        assert new
        assert not old & new


def test_a_store_that_cannot_be_written_is_said_at_once(bucket, tmp_path, capsys):
    for store, cause in ((f"{bucket}-none/x", "cannot be written"), ("s3://x", "bucket")):
        assert main(arguments(tmp_path / "run", f"store={store}")) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"opd_jax: error: {store}")
        assert cause in error
        assert "\n" not in error


def test_a_forced_stage_that_fails_is_not_done_when_its_store_is_far(bucket, tmp_path):
    """What is put away there is gone, so its record must not come back."""
    records, store = StageRecords(tmp_path), StoreFiles(f"{bucket}/run/rollouts")
    texts = tmp_path / "texts"
    records.finish("rollout", {"seconds": 1.0})
    store.write("commits/a.json", b"1")
    texts.mkdir()
    records.set_aside("rollout", [texts, store], {})
    assert records.done("rollout") is None
    assert not exists(texts)
    assert not exists(store)
    records.put_back("rollout", [texts, store])
    assert exists(texts)
    assert records.done("rollout") is None
