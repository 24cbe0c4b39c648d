"""What a stage cost adds up over tries that ended early, each on its own devices."""

import json
import time
from types import SimpleNamespace

import pytest

from opd_jax.stages import pipeline
from opd_jax.stages.records import Spent, StageRecords

INPUTS = {"seed": 0}


def run_on(tmp_path, devices):
    mesh = SimpleNamespace(size=devices)
    return SimpleNamespace(records=StageRecords(tmp_path), mesh=mesh, share=None)


def noted(ctx):
    return Spent.of(ctx.records.started("train.opd"))


def test_tries_that_ended_early_add_up_each_with_its_devices(tmp_path):
    one, four = run_on(tmp_path, 1), run_on(tmp_path, 4)

    def interrupted():
        with pipeline._timed(one, "train.opd", INPUTS):
            time.sleep(0.2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first = noted(one)
    assert 0.2 <= first.seconds == first.device_seconds
    with pipeline._timed(four, "train.opd", INPUTS) as elapsed:
        time.sleep(0.2)
        spent = elapsed()
    assert spent.seconds >= first.seconds + 0.2
    assert spent.device_seconds == pytest.approx(4 * spent.seconds - 3 * first.seconds)
    cost = pipeline._cost(four, "train.opd", spent, None)
    assert cost["seconds"] == round(spent.seconds, 3)
    assert cost["device_seconds"] == round(spent.device_seconds, 3)


def test_what_is_noted_on_disk_follows_so_a_kill_forgets_little(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "TICK_SECONDS", 0.02)
    ctx = run_on(tmp_path, 2)
    with pipeline._timed(ctx, "train.opd", INPUTS) as elapsed:
        deadline = time.monotonic() + 30
        while noted(ctx).seconds < 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found = noted(ctx)
        assert found.device_seconds == pytest.approx(2 * found.seconds, abs=0.002)  # to a ms each
        assert found.seconds <= elapsed().seconds


def test_a_share_that_ends_just_after_another_leaves_the_record_as_it_is(tmp_path):
    """The other one ends the stage, and drops what shares took, between this one's last steps."""
    ctx = run_on(tmp_path, 2)
    ctx.share = (1, 2)
    ctx.records.tick("score.share-1-of-2", INPUTS, Spent(3.0, 6.0))
    ctx.records.tick("score.share-2-of-2", INPUTS, Spent(5.0, 10.0))
    other = pipeline._cost(ctx, "score", Spent(), None)
    ctx.records.finish("score", {"inputs": INPUTS, **other})
    ctx.records.tick("score.share-1-of-2", INPUTS, Spent(3.1, 6.2))  # its last one
    mine = pipeline._cost(ctx, "score", Spent(), None)
    pipeline._finish(ctx, "score", {"inputs": INPUTS, **mine}, None)
    assert ctx.records.done("score")["device_seconds"] == 16.0
    assert not list((tmp_path / "stages").glob("*.started.json"))
    before = ctx.records.done("score")  # as where this one makes good what has gone
    pipeline._finish(ctx, "score", {"inputs": INPUTS, **mine}, before)
    assert ctx.records.done("score") == {"inputs": INPUTS, **mine}
    pipeline._finish(ctx, "score", {"inputs": INPUTS}, before)  # as another one, too
    assert ctx.records.done("score") == {"inputs": INPUTS, **mine}


def test_shares_that_were_killed_and_a_stage_made_good_add_up(tmp_path):
    ctx = run_on(tmp_path, 2)
    for number, seconds in ((1, 3.0), (2, 5.0)):
        name = f"score.share-{number}-of-2"
        assert ctx.records.start(name, INPUTS) == Spent()
        ctx.records.tick(name, INPUTS, Spent().more(seconds, number))
        assert ctx.records.start(name, INPUTS) == Spent(seconds, number * seconds)
    before = {"seconds": 7.0, "device_seconds": 14.0}
    cost = pipeline._cost(ctx, "score", Spent(), before)
    assert (cost["seconds"], cost["device_seconds"]) == (12.0, 14.0 + 3.0 + 10.0)
    note = json.loads((tmp_path / "stages" / "score.share-2-of-2.started.json").read_text())
    assert note == {"inputs": INPUTS, "seconds": 5.0, "device_seconds": 10.0}
