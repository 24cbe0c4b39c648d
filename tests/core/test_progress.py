"""What a stage prints."""

from __future__ import annotations

import io
import re

import jax
import pytest

from opd_jax.core import progress
from opd_jax.core.progress import StageProgress, say


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_last_line_sums_the_stage_up(capsys, clock):
    with StageProgress("rollout", total=4000) as stage:
        stage.add(4000, tokens=181_234)
        clock[0] += 14.7
    expected = f"{'rollout':<20}4,000 records  181,234 tokens  12,329 tok/s  14.7 s\n"
    assert capsys.readouterr().out == expected
    clock[0] += 100
    assert stage.seconds == pytest.approx(14.7)


def test_a_log_gets_a_line_now_and_then(capsys, clock):
    with StageProgress("train", total=100, unit="steps", already=20) as stage:
        for _ in range(80):
            clock[0] += 1.0
            stage.add(1, tokens=10, note="loss 0.5")
    lines = capsys.readouterr().out.splitlines()
    assert [line.replace(" " * 15, " ") for line in lines] == [
        "train 50/100 steps  10 tok/s  50.0 s left  loss 0.5",
        "train 80/100 steps  10 tok/s  20.0 s left  loss 0.5",
        "train 100 steps  (20 from before)  800 tokens  10 tok/s  1 min 20 s  loss 0.5",
    ]


def test_compiling_is_not_taken_for_the_speed(capsys, clock):
    """The first step waits for the compiler: 80 s, and then a step a second."""
    with StageProgress("train", total=60, unit="steps") as stage:
        clock[0] += 80.0
        stage.add(1, tokens=10)
        for _ in range(31):
            clock[0] += 1.0
            stage.add(1, tokens=10)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[:2]] == ["1/60 steps", "29.0 s left"]
    assert "10 tok/s" in lines[1]


def test_what_comes_with_the_first_batch_is_no_speed(capsys, clock):
    """250 answers at once after 90 s, the next 250 ten seconds on: not 250 in a millisecond."""
    with StageProgress("answer", total=1000) as stage:
        clock[0] += 90.0
        for _ in range(250):
            clock[0] += 0.001
            stage.add(1, tokens=50)
        clock[0] += 40.0
        for _ in range(250):
            stage.add(1, tokens=50)
        stage._last_line = 0.0
        clock[0] += 10.0
        stage.add(0)
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0]
    assert lines[2].endswith("500/1,000 records  250 tok/s  1 min 40 s left")


def test_an_error_leaves_how_far_it_came(capsys, clock):
    def fail_halfway():
        with StageProgress("score", total=9) as stage:
            stage.add(4)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert capsys.readouterr().out.split() == ["score", "4/9", "records", "stopped"]


def test_other_processes_are_silent(capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    say("hello")
    with StageProgress("sft", total=1) as stage:
        stage.add(1)
    assert capsys.readouterr().out == ""


def test_text_in_brackets_is_printed_as_it_is(capsys):
    say("mesh [data=2] is [bold]")
    assert capsys.readouterr().out == "mesh [data=2] is [bold]\n"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_all_on_a_line_and_a_bar_where_there_is_room(monkeypatch, clock, width):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(progress.sys, "stdout", screen)
    console = progress.Console(file=screen, force_terminal=True, width=width)
    monkeypatch.setattr(progress, "_console", console)
    with StageProgress("rollout", total=4000, unit="sampled") as stage:
        stage.add(2000, tokens=20)
        clock[0] += 100.0
        stage.add(1000, tokens=181_000, note="mean 181 tokens  3.1% truncated")
        stage._bar.refresh()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    told = "3,000/4,000 sampled  1,810 tok/s  1 min 40 s left  mean 181 tokens"
    line = next(x for x in re.split(r"[\r\n]+", shown) if told in x)
    assert line.startswith("rollout ")
    assert ("━" in line) == ("3.1% truncated" in line) == (width == 120)
    assert "3,000 sampled" in screen.getvalue()
