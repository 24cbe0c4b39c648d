"""What a run knows besides its parameters is known again when it goes on, on any mesh."""

import dataclasses
import shutil
import signal

import jax
import numpy as np
import pytest
from models import tiny
from test_loop import PLAIN, batch_of

from opd_jax.config import MeshConfig
from opd_jax.config_train import GuardConfig, RefreshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.core.trace import FIRST
from opd_jax.errors import Preempted
from opd_jax.train import checkpoint
from opd_jax.train.batch_source import Source
from opd_jax.train.guard import Guard, Saturation
from opd_jax.train.loop import TrainJob, is_evaluated, run_training
from opd_jax.train.rounds import Rounds
from opd_jax.train.step import Objective
from opd_jax.train.watch import Watch

pytestmark = pytest.mark.usefixtures("compiled_once")
ONE = MeshConfig(fsdp=1)
CUT = MeshConfig(fsdp=2, tensor=2)
STEPS = 6
# Judged by a figure that is best after 2 steps and bad from 4 on: two warnings stop the run at 5.
KLS = {0: 1.0, 1: 0.9, 2: 0.5, 3: 0.7, 4: 2.0, 5: 3.0, 6: 0.1}


class CutOffError(Exception):
    """Stands for a kill."""


def job_of(folder, mesh=ONE, **changes):
    model, params = tiny(make_mesh(mesh), num_layers=1)
    loop = PLAIN.model_copy(update={"steps": STEPS, "save_every": 1, "eval_every": 1, **changes})
    return TrainJob(model, Objective("sft"), loop, folder / "state", "inputs"), params


def source_until(cut=None):
    """Batches that end with a kill at a step."""

    def next_batch(step, current):
        if step == cut:
            raise CutOffError
        return batch_of(step, 4)

    return Source(lambda _start: next_batch)


class Known(Watch):
    """Finds the KL that belongs to a number of steps, and a figure of the parameters' bits."""

    sigterm_at = None

    def look(self, steps, *more):
        def probe(params):
            if steps == self.sigterm_at:
                signal.raise_signal(signal.SIGTERM)
                pytest.fail("went on")
            bits = float(np.asarray(params["embed"], np.float64).sum())
            found = {"fresh_reverse_kl": KLS[steps], "fresh_reverse_kl_stderr": 0.01, "x": bits}
            return found | {"heldout_gap": float("nan")}  # JSON has no such number

        self.probes = [probe]
        super().look(steps, *more)


def watched(job, params, cut=None, seen=None):
    """Run with a guard; `seen` collects what is reported."""
    seen = [] if seen is None else seen

    def report(steps, figures, warnings):
        seen.append((steps, figures["fresh_reverse_kl"], figures["x"], tuple(warnings)))

    guard = Guard(GuardConfig(action="stop", final="best"))
    watch = Known(job.loop, report, job.directory.parent / "best", [dict], guard)
    return run_training(job, lambda: params, source_until(cut), lambda *_: None, watch)


def assert_same(straight, resumed):
    assert straight[1:] == resumed[1:]
    for a, b in zip(jax.tree.leaves(straight[0]), jax.tree.leaves(resumed[0]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(("save_every", "cuts"), [(1, (1, 3, 4)), (3, (2, 4, 4))])
def test_evaluations_and_what_follows_from_them_are_those_of_a_straight_run(
    tmp_path, save_every, cuts
):
    """Best state, warnings and the end; also where the best state was found after the last save."""
    job, params = job_of(tmp_path / "straight", save_every=save_every)
    wanted = []
    straight = watched(job, params, seen=wanted)
    assert (straight.steps, straight.best) == (5, 2)
    assert [steps for steps, *_ in wanted] == [0, 1, 2, 3, 4, 5]
    assert [bool(warnings) for *_, warnings in wanted] == [False] * 4 + [True] * 2
    job, _ = job_of(tmp_path / "cut", save_every=save_every)
    reports = []
    for cut in cuts:
        with pytest.raises(CutOffError):
            watched(job, params, cut, reports)
    resumed = watched(job, params, seen=reports)
    assert_same(straight, resumed)
    assert sorted(set(reports)) == wanted  # what is told twice is told in the same bits
    assert_same(straight, watched(job, params))  # a try after the end finds the same
    best = [path.name for path in (tmp_path / "cut" / "best").iterdir()]
    assert best == ["00000002"]


@pytest.mark.slow
def test_a_best_state_of_a_try_that_was_given_up_is_not_kept(tmp_path):
    """It has more steps than the one that is found next, and would count as the newest."""
    job, params = job_of(tmp_path)
    straight = watched(job, params)
    stale = tmp_path / "best"
    for folder in ("state", "best"):
        shutil.rmtree(tmp_path / folder)
    checkpoint.save(stale, 9, jax.tree.map(np.zeros_like, params), {})
    with pytest.raises(CutOffError):
        watched(job, params, 3)
    assert checkpoint.complete_steps(stale) == [2]
    checkpoint.save(stale, 9, jax.tree.map(np.zeros_like, params), {})
    assert_same(straight, watched(job, params))


def test_a_best_state_that_a_later_one_replaced_is_found_anew(tmp_path):
    job, params = job_of(tmp_path)
    with pytest.raises(CutOffError):
        watched(job, params, 3)  # the best is that of 2 steps
    shutil.rmtree(tmp_path / "best" / "00000002")
    assert watched(job, params).best == 4  # goes on after 3 steps, and finds the next one best


def test_saturation_counts_finite_gaps_alone():
    saturation = Saturation(tolerance=0.1)
    for gap in (0.5, 0.5, float("nan"), 0.5, 0.5):
        assert saturation.look(gap) is None
    assert saturation.look(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [(ONE, CUT), (CUT, ONE)], ids=["cut up", "put together"])
def test_a_run_goes_on_on_another_mesh(tmp_path, meshes):
    """Not to the bit: sums over parts are rounded in another order."""
    straight = watched(*job_of(tmp_path / "straight", meshes[0]))
    job, params = job_of(tmp_path / "moved", meshes[0])
    with pytest.raises(CutOffError):
        watched(job, params, 3)
    job, params = job_of(tmp_path / "moved", meshes[1])
    moved = watched(job, params)
    assert moved[1:] == straight[1:]
    for a, b in zip(jax.tree.leaves(straight.params), jax.tree.leaves(moved.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def interrupted(job, params, at, stride=1):
    """SIGTERM comes while step `at` waits for its batch."""

    def next_batch(step, current):
        if step == at:
            signal.raise_signal(signal.SIGTERM)
        return batch_of(step, 4)

    source = Source(lambda _start: next_batch, 1, stride)
    return run_training(job, lambda: params, source, lambda *_: None)


@pytest.mark.parametrize(("stride", "at", "saved"), [(1, 2, 2), (2, 2, 2), (2, 3, 4)])
def test_sigterm_saves_the_next_step_that_can_be_resumed(tmp_path, stride, at, saved):
    """The batch is given up only where the run can be resumed."""
    job, params = job_of(tmp_path, save_every=100)
    with pytest.raises(Preempted, match=f"SIGTERM: step {saved} is saved in {job.directory}"):
        interrupted(job, params, at, stride)
    assert checkpoint.complete_steps(job.directory) == [saved]


@pytest.mark.slow
def test_what_was_traced_when_sigterm_came_is_written(tmp_path):
    job, params = job_of(tmp_path, save_every=100)
    job = dataclasses.replace(job, profile=tmp_path / "profile")
    with pytest.raises(Preempted):
        interrupted(job, params, FIRST + 1)
    assert list(job.profile.rglob("*.xplane.pb"))


@pytest.mark.parametrize("at", [2, 5])
def test_sigterm_in_an_evaluation_leaves_it_to_the_next_try(tmp_path, at):
    job, params = job_of(tmp_path / "straight", save_every=100)
    straight = watched(job, params)
    job, _ = job_of(tmp_path / "cut", save_every=100)
    steps, seen = [], []
    guard = Guard(GuardConfig(action="stop", final="best"))
    watch = Known(job.loop, lambda *_: None, tmp_path / "cut" / "best", [dict], guard)
    watch.sigterm_at = at
    with pytest.raises(Preempted, match=f"step {at} is saved"):
        run_training(job, lambda: params, source_until(), lambda s, _: steps.append(s), watch)
    assert steps == list(range(at))  # none of their lines is lost
    assert checkpoint.complete_steps(job.directory) == [at]
    assert not is_evaluated(job.directory, at)
    kept = job.directory / f"{at:08d}" / "complete.json"
    written = kept.stat().st_mtime_ns
    assert_same(straight, watched(job, params, seen=seen))
    assert [steps for steps, *_ in seen] == list(range(at, 6))
    assert kept.stat().st_mtime_ns == written  # not removed to be saved again


def test_a_notice_before_the_first_step_ends_the_run(tmp_path):
    """The evaluation before it has no state to save: what ends a stage is not held back."""
    job, params = job_of(tmp_path)

    class First(Known):
        def look(self, steps, *more):
            raise Preempted("SIGTERM")

    watch = First(job.loop, lambda *_: None, tmp_path / "best", [dict])
    with pytest.raises(Preempted):
        run_training(job, lambda: params, source_until(), lambda *_: None, watch)
    assert checkpoint.latest_step(job.directory) is None


def test_a_second_sigterm_leaves_the_saved_state_alone(tmp_path):
    job, params = job_of(tmp_path, save_every=100)
    saved = []
    for _ in range(2):
        watch = Known(job.loop, lambda *_: None, tmp_path / "best", [dict], Guard(GuardConfig()))
        watch.sigterm_at = 2
        with pytest.raises(Preempted, match="step 2 is saved"):
            run_training(job, lambda: params, source_until(), lambda *_: None, watch)
        saved.append((job.directory / "00000002" / "complete.json").stat().st_mtime_ns)
    assert saved[0] == saved[1]


def test_a_best_state_that_an_unseen_last_one_replaced_is_found_anew(tmp_path, monkeypatch):
    """A try that evaluated it was killed before the run's end; this one finds it worse."""
    job, params = job_of(tmp_path, save_every=100)

    def run(sigterm_at=None):
        guard = Guard(GuardConfig(final="best"))
        watch = Known(job.loop, lambda *_: None, tmp_path / "best", [dict], guard)
        watch.sigterm_at = sigterm_at
        return run_training(job, lambda: params, source_until(), lambda *_: None, watch)

    with pytest.raises(Preempted, match="step 6 is saved"):
        run(sigterm_at=6)
    assert checkpoint.complete_steps(tmp_path / "best") == [2]
    assert run().best == 6
    monkeypatch.setitem(KLS, 6, 0.9)
    assert run().best == 6


def test_a_run_with_rounds_finishes_its_evaluation(tmp_path):
    job, params = job_of(tmp_path, save_every=100)
    looked = []

    class Late(Known):
        def look(self, steps, *more):
            if steps == 2:
                signal.raise_signal(signal.SIGTERM)
            super().look(steps, *more)
            looked.append(steps)

    rounds = Rounds(RefreshConfig(on_drift=True), STEPS)
    watch = Late(job.loop, lambda *_: None, tmp_path / "best", [dict], rounds=rounds)
    with pytest.raises(Preempted, match="step 2 is saved"):
        run_training(job, lambda: params, source_until(), lambda *_: None, watch)
    assert looked == [0, 1, 2]
    assert is_evaluated(job.directory, 2)


def test_sigterm_after_the_last_evaluation_is_not_forgotten(tmp_path):
    job, params = job_of(tmp_path, save_every=100)

    class Late(Known):
        def look(self, steps, *more):
            super().look(steps, *more)
            if steps == 5:
                signal.raise_signal(signal.SIGTERM)

    guard = Guard(GuardConfig(action="stop"))
    watch = Late(job.loop, lambda *_: None, tmp_path / "best", [dict], guard)
    with pytest.raises(Preempted, match="step 5 is saved"):
        run_training(job, lambda: params, source_until(), lambda *_: None, watch)
    assert watch.stopped
    assert is_evaluated(job.directory, 5)


def test_a_sigterm_before_an_evaluation_leaves_it_to_the_next_try(tmp_path):
    job, params = job_of(tmp_path, save_every=100)
    seen = []

    def next_batch(step, current):
        if step == 1:  # not at rest: the step is done
            signal.raise_signal(signal.SIGTERM)
        return batch_of(step, 4)

    guard = Guard(GuardConfig(action="stop", final="best"))
    watch = Known(job.loop, lambda *told: seen.append(told), tmp_path / "best", [dict], guard)
    source = Source(lambda _start: next_batch, 1, 2)
    with pytest.raises(Preempted, match="step 2 is saved"):
        run_training(job, lambda: params, source, lambda *_: None, watch)
    assert [steps for steps, *_ in seen] == [0, 1]
    assert checkpoint.latest_step(job.directory) == 2
    watched(job, params, seen=seen)
    assert [steps for steps, *_ in seen] == [0, 1, 2, 3, 4, 5]
