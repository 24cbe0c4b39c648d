"""A run that nothing can be evaluated on says so, or is refused where evaluations decide."""

import pytest

from opd_jax.config_train import GuardConfig, RefreshConfig, TrainRun
from opd_jax.errors import ConfigError
from opd_jax.stages.watching import tell_if_unwatched


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


def test_nothing_held_out_is_said_unless_it_was_asked_for(capsys):
    tell_if_unwatched("train.opd", TrainRun(heldout=0), [])
    assert capsys.readouterr().out == ""
    tell_if_unwatched("train.opd", TrainRun(), [])
    assert "WARNING: nothing is held out" in capsys.readouterr().out
