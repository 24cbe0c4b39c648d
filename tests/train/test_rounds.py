"""When rounds begin, what they sample, and that a state is saved before one is drawn."""

import jax
import numpy as np
import pytest
from models import tiny

from opd_jax.config import MeshConfig
from opd_jax.config_train import GuardConfig, LoopConfig, OptimConfig, RefreshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.data.loader import step_order
from opd_jax.train import checkpoint
from opd_jax.train.batch_source import Source
from opd_jax.train.guard import Guard
from opd_jax.train.loop import TrainJob, run_training
from opd_jax.train.probes import held_out
from opd_jax.train.rounds import PromptPlan, Rounds
from opd_jax.train.step import Objective
from opd_jax.train.watch import Watch

STATE = {"x": np.zeros(1, np.float32)}
PROMPTS = [(f"p{i:02}", [i]) for i in range(20)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"every": 3}, [0, 3, 6, 9]),
        ({"every": 5}, [0, 5]),
        ({"every": 3, "rounds": 2}, [0, 3, 6]),
        ({"every": 10}, [0]),
        ({"on_drift": True}, [0, 4, 8]),
        ({"on_drift": True, "rounds": 1}, [0, 4]),
        ({"every": 3, "on_drift": True}, [0, 3, 4, 7, 8]),
    ],
)
def test_rounds_begin_when_they_are_due_and_on_drift(config, expected):
    """10 steps; after 4, 8 and 10 of them an evaluation has a warning."""
    rounds = Rounds(RefreshConfig(**config), 10)
    ends = [rounds.end]
    for done in range(1, 11):
        due = rounds.due(done)
        turned = rounds.turn(done, drifted=done in (4, 8, 10), stopped=False)
        assert turned or not due
        if turned:
            ends.append(rounds.end)
    assert rounds.starts == expected
    assert all(start < end <= 10 for start, end in zip(expected, ends, strict=True))
    assert all(start <= end for start, end in zip(expected[1:], ends, strict=False))


def test_a_state_of_rounds_is_not_changed_by_what_follows():
    rounds = Rounds(RefreshConfig(every=2), 10, snapshots=["a"])
    rounds.turn(2, drifted=False, stopped=False)
    state = rounds.state()
    rounds.snapshots.append("b")
    assert rounds.lineage() == [{"step": 2, "rollouts": "b"}]
    rounds.turn(4, drifted=False, stopped=False)
    assert state == {"starts": [0, 2], "snapshots": ["a"]}
    rounds.restore(state)
    assert (rounds.number, rounds.end, rounds.snapshots) == (1, 4, ["a"])


def test_a_round_samples_what_its_steps_take_and_what_is_held_out():
    """In the order in which the online baseline would ask, each sample once."""
    loop = LoopConfig(steps=12, batch_size=4, heldout=4)
    plan = PromptPlan.of(list(reversed(PROMPTS)), 2, loop, seed=3)
    everything = [(name, index) for name, _ in PROMPTS for index in range(2)]
    assert [(r.prompt_id, r.sample_index) for r in plan.everything] == everything
    members, kept = held_out([name for name, _ in everything], 4)
    assert plan.kept == kept
    order = step_order(len(members), 4, 3)
    for step, taken in enumerate(plan.steps):
        assert taken == [members[order[step * 4 + i]] for i in range(4)]
    for first, end in ((0, 3), (3, 4), (4, 12)):
        asked = [(r.prompt_id, r.sample_index) for r in plan.requests(first, end)]
        wanted = [everything[i] for step in plan.steps[first:end] for i in step]
        assert asked == [*dict.fromkeys(wanted), *(everything[i] for i in kept)]
    assert len(plan.requests(0, 12)) == 40  # steps take 48: the ninth of an epoch begins another


def watch_of(folder, action, config, std, **loop):
    return Watch(
        LoopConfig(eval_every=2, **loop),
        lambda steps, figures, warnings: None,
        folder,
        [lambda params: {"heldout_w_std": std.get("now", 9.0)}],
        Guard(GuardConfig(action=action, patience=1, fresh=0)),
        rounds=Rounds(RefreshConfig(**config), 10),
    )


def test_drift_begins_a_round_in_place_of_the_stop_while_rounds_are_left(tmp_path):
    watch = watch_of(tmp_path, "stop", {"on_drift": True, "rounds": 1}, {}, steps=10)
    watch.look(2, lambda: STATE)
    assert watch.stopped
    assert watch.turn(2)
    assert not watch.stopped
    assert watch.guard.warned == 0
    assert not watch.turn(3)  # one warning, one round
    watch.look(4, lambda: STATE)
    assert not watch.turn(4)
    assert watch.stopped


def test_a_warning_begins_one_round_and_none_before_the_first_step(tmp_path):
    watch = watch_of(tmp_path, "warn", {"on_drift": True}, {}, steps=10)
    watch.look(0, lambda: STATE)
    assert not watch.turn(1)
    watch.look(2, lambda: STATE)
    assert [watch.turn(steps) for steps in (2, 3)] == [True, False]


def test_a_round_that_is_due_does_not_undo_a_stop(tmp_path):
    watch = watch_of(tmp_path, "stop", {"every": 2}, {}, steps=10)
    watch.look(2, lambda: STATE)
    assert not watch.turn(2)
    assert watch.stopped


def batch_of(step):
    ids = np.random.default_rng(step).integers(0, 64, (2, 2, 8)).astype(np.int32)
    return {
        "input_bt": ids[0],
        "target_bt": ids[1],
        "positions_bt": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
        "segments_bt": np.ones((2, 8), np.int32),
        "mask_bt": np.ones((2, 8), bool),
    }


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_state_is_saved_before_a_round_is_drawn(tmp_path, killed):
    """A run that is killed while it draws finds the same round and the same student again."""
    model, params = tiny(make_mesh(MeshConfig(fsdp=1)), num_layers=1)
    loop = LoopConfig(
        steps=5, batch_size=2, save_every=50, eval_every=2, optim=OptimConfig(learning_rate=1e-3)
    )
    drawn = []

    def train(dies):
        std = {"now": 0.1}
        watch = watch_of(tmp_path / "best", "warn", {"every": 3, "on_drift": True}, std, steps=5)

        def next_batch(step, current):
            number = watch.rounds.number
            if step == watch.rounds.starts[-1]:
                saved = checkpoint.latest_step(tmp_path / "state")
                drawn.append((number, step, saved, jax.device_get(current())["embed"]))
                if dies and number:
                    raise KeyboardInterrupt
            std["now"] = 9.0 if step == 3 else 0.1  # of the evaluation after 4 steps
            return batch_of(step)

        job = TrainJob(model, Objective("sft"), loop, tmp_path / "state", "inputs")
        run_training(job, lambda: params, Source(lambda _start: next_batch), lambda *_: None, watch)
        return watch

    if killed:
        with pytest.raises(KeyboardInterrupt):
            train(dies=True)
    assert train(dies=False).rounds.starts == [0, 3, 4]
    again = [(1, 3, 3)] if killed else []
    assert [x[:3] for x in drawn] == [(0, 0, None), (1, 3, 3), *again, (2, 4, 4)]
    np.testing.assert_array_equal(drawn[1][3], drawn[-2][3])
    assert np.abs(drawn[1][3] - drawn[-1][3]).max() > 0
