"""Through the command line: what a pass is bound to, and that a bad teacher costs no good pass."""

import shutil

import numpy as np
import pytest
from tiny_run import arguments

from opd_jax.core.run_lock import file_lock
from opd_jax.data.store import open_store
from opd_jax.errors import DataError
from opd_jax.main import main
from opd_jax.stages import common

pytestmark = pytest.mark.slow  # each test redoes stages of a whole run

SETTINGS = ("prompts.opd_limit=16", "score.batch_tokens=64")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("bound") / "run"
    assert main(arguments(run_dir, *SETTINGS, "--stages", "answer,sft,rollout")) == 0
    return run_dir


@pytest.fixture
def run(sampled, tmp_path):
    return shutil.copytree(sampled, tmp_path / "run")


def score(run, *words):
    return main(arguments(run, *SETTINGS, "--stages", "score", *words))


def logprobs(run):
    (folder,) = (run / "rollouts" / "teacher").iterdir()
    store = open_store(run / "rollouts")
    snapshot = store.freeze()
    scores = store.open_pass(folder.name).read_many(snapshot, range(len(snapshot)))
    return np.concatenate([s.logprob for s in scores])


def test_a_pass_that_is_begun_goes_on_as_it_was_begun_or_not_at_all(run, capsys):
    assert score(run, "--share", "1/2") == 0
    for words, message in (
        (("--share", "2/3"), "'shares' is 2, this run has 3"),
        (("--share", "2/2", "score.batch_tokens=32"), "'batch_tokens' is 64, this run has 32"),
        (("score.batch_tokens=32",), "'batch_tokens' is 64, this run has 32"),
        (("mesh.fsdp=2", "mesh.tensor=2"), "'mesh_ways' is 4, this run has 2"),
    ):
        capsys.readouterr()
        assert score(run, *words) == 2
        text = capsys.readouterr().err
        assert message in text
        assert "--force score" in text or "--share" in text
    assert score(run, "--share", "2/2") == 0
    shared = logprobs(run)
    assert score(run, "--force", "score") == 0
    np.testing.assert_array_equal(logprobs(run), shared)


@pytest.mark.parametrize("name", ["", ".1-of-2"])
def test_a_share_is_not_done_twice_at_a_time(run, capsys, name):
    """Nor beside a run that does all."""
    assert score(run, "--share", "2/2") == 0
    (folder,) = (run / "rollouts" / "teacher").iterdir()
    path = run / "rollouts" / ".locks" / f"{folder.name}{name}"
    with file_lock(path, "", ""):
        assert score(run, "--share", "1/2") == 2
        assert "is in use by process" in capsys.readouterr().err
    assert score(run, "--share", "1/2") == 0


def test_a_teacher_that_fails_its_self_test_costs_no_good_pass(run, monkeypatch, capsys):
    assert score(run) == 0
    before = logprobs(run)

    def fails(*_):
        raise DataError("teacher: self-test: no")

    monkeypatch.setattr(common, "self_test", fails)
    assert score(run, "--force", "score") == 2
    assert "self-test: no" in capsys.readouterr().err
    np.testing.assert_array_equal(logprobs(run), before)
    assert score(run) == 0
    assert "done before" in capsys.readouterr().out
