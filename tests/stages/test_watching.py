"""A run that nothing can be evaluated on says so, or is refused where evaluations decide."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from opd_jax.config_train import GuardConfig, RefreshConfig, TrainRun
from opd_jax.errors import ConfigError
from opd_jax.stages.training import better_state
from opd_jax.stages.watching import check_judged, check_probe, tell_if_unwatched
from opd_jax.train.guard import Guard


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"guard": GuardConfig(action="stop")}, "guard.action=stop"),
        ({"guard": GuardConfig(final="best")}, "guard.final=best"),
        ({"refresh": RefreshConfig(on_drift=True)}, "refresh.on_drift"),
    ],
)
def test_what_evaluations_decide_needs_held_out_records(changes, key):
    run = TrainRun(**changes)
    with pytest.raises(ConfigError, match=rf"train\.opd: {key} needs held-out records, .*heldout"):
        tell_if_unwatched("train.opd", run, [])
    tell_if_unwatched("train.opd", run, [3])


@pytest.mark.parametrize(
    ("changes", "grader", "words"),
    [
        (
            {"algorithm": "opd", "guard": GuardConfig(action="stop", fresh=0)},
            "exact",
            "guard.fresh",
        ),
        (
            {"objective": "topk", "guard": GuardConfig(final="best")},
            "none",
            "guard.teacher=true, or prompts with answers and evaluate.grader",
        ),
        (
            {"objective": "topk", "refresh": RefreshConfig(on_drift=True)},
            "none",
            "guard.teacher=true",
        ),
    ],
)
def test_what_evaluations_decide_needs_something_that_judges(changes, grader, words):
    prompts = [SimpleNamespace(answer=None), SimpleNamespace(answer="7")]
    evaluate = SimpleNamespace(grader=grader)
    ctx = SimpleNamespace(config=SimpleNamespace(evaluate=evaluate), prompts=lambda _: prompts)
    run = TrainRun(**changes)
    with pytest.raises(ConfigError, match=rf"^train\.runs\.x: .* needs something.*set {words}"):
        check_judged(ctx, "train.runs.x", run)
    asked = {key: changes[key] for key in ("guard", "refresh") if key in changes}
    check_judged(ctx, "train.runs.x", TrainRun(**asked))  # drift: sampled tokens, stored
    evaluate.grader = "exact"
    if run.guard.fresh:
        check_judged(ctx, "train.runs.x", run)
    prompts.pop()
    evaluate.grader = "none"
    judged = run.guard.model_copy(update={"fresh": 4, "teacher": True})
    check_judged(ctx, "train.runs.x", run.model_copy(update={"guard": judged}))


def test_the_held_out_prompts_themselves_have_to_be_judged():
    run = TrainRun(objective="topk", guard=GuardConfig(final="best"))
    neither = SimpleNamespace(grade=None, teacher=None)
    for fresh in (None, neither):
        with pytest.raises(ConfigError, match=r"^train\.x: guard\.final=best needs something"):
            check_probe("train.x", run, fresh)
    for judge in ("grade", "teacher"):
        check_probe("train.x", run, SimpleNamespace(**{**vars(neither), judge: len}))


def test_nothing_held_out_is_said_unless_it_was_asked_for(capsys):
    tell_if_unwatched("train.opd", TrainRun(heldout=0), [])
    assert capsys.readouterr().out == ""
    tell_if_unwatched("train.opd", TrainRun(), [])
    assert "WARNING: nothing is held out" in capsys.readouterr().out


def test_a_run_that_does_not_end_with_its_best_state_says_where_that_is():
    guard, kept = Guard(GuardConfig()), Path("opd/best")
    assert better_state(guard, 9, kept) == better_state(None, 9, kept) == ""
    for steps, kl in ((0, 0.5), (30, 0.1), (60, 0.4)):
        guard.look(steps, {"fresh_reverse_kl": kl})
    assert better_state(guard, 30, kept) == ""
    line = better_state(guard, 60, kept)
    assert line.startswith("the best state was that of 30 steps (fresh reverse KL 0.1000), kept in")
    assert line.endswith(f"{kept}; a run with guard.final=best ends with it")
