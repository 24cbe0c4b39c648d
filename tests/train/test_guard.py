import json
import math

import pytest

from opd_jax.config_train import GuardConfig, SFTConfig, TrainRun
from opd_jax.train.guard import REFRESH, Guard, Saturation

HEALTHY = {"heldout_w_std": 0.04, "heldout_token_log_w": -0.001}


def figures(**changes):
    return {**HEALTHY, **{f"heldout_{name}": value for name, value in changes.items()}}


def test_a_healthy_run_is_left_alone_and_its_best_state_is_kept():
    guard = Guard(GuardConfig(action="stop", patience=1))
    kls = (0.4, 0.2, 0.3)
    verdicts = [guard.look(s, {**HEALTHY, "fresh_reverse_kl": kl}) for s, kl in enumerate(kls)]
    assert [v.best for v in verdicts] == [True, True, False]
    assert guard.best == ({**HEALTHY, "fresh_reverse_kl": 0.2}, 1)
    assert not any(v.warnings or v.stop for v in verdicts)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"w_std": 0.51}, "standard deviation of w on held-out rollouts is 0.510, beyond 0.5"),
        (
            {"token_log_w": -0.13},
            "log W per token of held-out rollouts is -0.130, beyond -0.12",
        ),
    ],
)
def test_a_limit_that_is_crossed_is_named_with_a_remedy(changes, expected):
    (line,) = Guard(GuardConfig(), remedy=REFRESH).look(10, figures(**changes)).warnings
    assert expected in line
    assert "refresh.every" in line
    assert not Guard(GuardConfig(action="off")).look(10, figures(**changes)).warnings


def test_worse_than_before_training_counts_only_beyond_the_noise():
    guard = Guard(GuardConfig())
    first = {"fresh_accuracy": 0.8, "fresh_accuracy_stderr": 0.07}
    guard.look(0, first)
    near = guard.look(10, {"fresh_accuracy": 0.65, "fresh_accuracy_stderr": 0.08})
    assert not near.warnings
    far = guard.look(20, {"fresh_accuracy": 0.5, "fresh_accuracy_stderr": 0.09})
    assert "fresh_accuracy is 0.500, worse than 0.800 before training" in far.warnings[0]


def test_stops_after_as_many_warnings_in_a_row_as_it_has_patience_for():
    guard = Guard(GuardConfig(action="stop", patience=2))
    bad = figures(w_std=0.6)
    found = [guard.look(s, f).stop for s, f in enumerate((HEALTHY, bad, HEALTHY, bad, bad))]
    assert found == [False, False, False, False, True]
    warned = Guard(GuardConfig(patience=1))
    assert not warned.look(0, bad).stop  # it only warns


def test_the_most_trusted_judge_decides():
    guard = Guard(GuardConfig())
    guard.look(0, {**HEALTHY, "fresh_accuracy": 0.5, "fresh_reverse_kl": 0.3})
    better = {**HEALTHY, "fresh_accuracy": 0.9, "fresh_reverse_kl": 0.4}
    assert not guard.look(1, better).best
    better["fresh_reverse_kl"] = math.nan
    assert not guard.look(2, better).best
    assert guard.look(3, {**better, "fresh_reverse_kl": 0.1}).best


def test_what_cannot_tell_two_states_apart_leaves_it_to_the_next_judge():
    """No answer is right: of two states the later is better, if it is within the limits."""
    guard = Guard(GuardConfig())
    none = {"fresh_accuracy": 0.0, "fresh_accuracy_stderr": 0.0}
    drift = (0.0, -0.01, -0.13, -0.11)
    looks = [guard.look(s, {**none, **figures(token_log_w=x)}) for s, x in enumerate(drift)]
    assert [look.best for look in looks] == [True, True, False, True]
    near = {"fresh_accuracy": 0.5, "fresh_accuracy_stderr": 0.09}
    far = figures(token_log_w=-0.13)
    guard = Guard(GuardConfig())
    guard.look(0, {**near, **HEALTHY})
    assert not guard.look(1, {**near, "fresh_accuracy": 0.55, **far}).best
    assert guard.look(2, {**near, "fresh_accuracy": 0.8, **far}).best


def test_ever_worse_states_do_not_follow_each_other_as_the_best():
    """Each is within the noise of the one before."""
    guard = Guard(GuardConfig(action="stop", patience=2), limited=False)
    accuracies = (0.81, 0.72, 0.62, 0.53, 0.44)
    for steps, accuracy in enumerate(accuracies):
        guard = guard.restored(json.loads(json.dumps(guard.state())))
        verdict = guard.look(steps, {"fresh_accuracy": accuracy, "fresh_accuracy_stderr": 0.07})
    assert verdict.stop
    assert guard.best[1] == 1


def test_the_weighted_reverse_kl_judges_nothing():
    """It falls while the student is lost (docs/method.md)."""
    guard = Guard(GuardConfig())
    looks = [guard.look(s, figures(iw_reverse_kl=kl)) for s, kl in enumerate((0.3, 0.5, 0.1))]
    assert [look.best for look in looks] == [True, True, True]
    lost = guard.look(3, figures(iw_reverse_kl=0.0, token_log_w=-0.2))
    assert not lost.best
    assert not any(look.warnings for look in looks)
    assert lost.warnings


def test_drift_is_no_danger_to_an_objective_that_knows_the_distribution():
    far = figures(token_log_w=-0.4, w_std=0.9)
    guard = Guard(GuardConfig(action="stop", patience=1), limited=False)
    guard.look(0, HEALTHY)
    found = guard.look(1, far)
    assert found.best
    assert not found.warnings
    assert not found.stop
    again = guard.restored(guard.state())
    assert not again.look(2, far).warnings


def test_a_warning_advises_what_the_run_can_do():
    far = figures(token_log_w=-0.4)
    stored, online = Guard(GuardConfig(), remedy=REFRESH), Guard(GuardConfig())
    assert "refresh.every" in stored.look(1, far).warnings[0]
    assert "refresh.every" in stored.restored(stored.state()).look(2, far).warnings[0]
    assert "refresh.every" in stored.restored(None).look(2, far).warnings[0]
    assert online.look(1, far).warnings[0].endswith("or train fewer steps")


def test_an_error_that_is_not_known_gives_no_warning():
    guard = Guard(GuardConfig())
    one = {"fresh_reverse_kl_stderr": math.nan}  # of one response
    guard.look(0, {"fresh_reverse_kl": 0.3, **one})
    assert not guard.look(1, {"fresh_reverse_kl": 0.5, **one}).warnings


def test_new_rollouts_are_not_measured_by_the_old_ones():
    guard = Guard(GuardConfig())
    guard.look(0, figures(token_log_w=-0.11))
    guard.turn()
    assert not guard.look(1, figures(token_log_w=-0.01)).warnings
    assert guard.best == (figures(token_log_w=-0.01), 1)


def test_a_restored_guard_goes_on_as_if_nothing_had_happened():
    config = GuardConfig(action="stop", patience=2)
    straight = Guard(config)
    sequence = [HEALTHY, figures(w_std=0.5), figures(w_std=0.6)]
    wanted = [straight.look(s, f) for s, f in enumerate(sequence)]
    guard, found = Guard(config), []
    for step, figure in enumerate(sequence):
        guard = Guard(config).restored(guard.state())
        found.append(guard.look(step, figure))
    assert found == wanted
    assert guard.restored(None) == Guard(config)


def test_what_is_kept_of_a_single_sample_is_valid_json():
    guard = Guard(GuardConfig())
    guard.look(0, {"fresh_accuracy": 1.0, "fresh_accuracy_stderr": math.nan})
    assert json.loads(json.dumps(guard.state(), allow_nan=False))["first"] == {"fresh_accuracy": 1}


def test_saturation_is_said_once_and_again_after_it_fell():
    probe = Saturation.of(*[SFTConfig(saturation=0.01)] * 2)
    gaps = (0.5, 0.2, 0.195, 0.192, 0.191, 0.1, 0.099, 0.098, 0.0975)
    said = [probe.look(gap) for gap in gaps]
    assert [bool(line) for line in said] == [False] * 3 + [True] + [False] * 3 + [True, False]
    assert "0.1920 nats a token, within 0.01 for three evaluations" in said[3]
    assert not probe.stops
    stops = SFTConfig(saturation=0.5, stop_when_saturated=True)
    assert Saturation.of(stops, stops) == Saturation(0.5, stops=True)
    assert Saturation.of(TrainRun(algorithm="sft"), stops) == Saturation(0.5)
