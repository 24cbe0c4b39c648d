"""The command line: what it hands on, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import types

import jax
import pytest

from opd_jax.errors import DataError, unwritable
from opd_jax.main import main

CONFIG = """\
run_dir: runs/demo
model: {student: s, teacher: t}
prompts: {sft: a.jsonl, opd: b.jsonl, eval: c.jsonl}
"""


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that only notes its arguments, or raises what the test puts into `error`."""
    fake = types.ModuleType("opd_jax.stages.pipeline")
    fake.calls, fake.error = [], None

    def run(config, *, stages, force, plan_only, share, profile):
        fake.calls.append((config, stages, force, plan_only))
        fake.share, fake.profile = share, profile
        if fake.error:
            raise fake.error

    fake.run = run
    monkeypatch.setitem(sys.modules, "opd_jax.stages.pipeline", fake)
    monkeypatch.setattr("opd_jax.stages.pipeline", fake, raising=False)
    return fake


def test_sigterm_in_any_stage_ends_with_its_line(config_path, pipeline, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert main(["--config", config_path]) == 143
    assert capsys.readouterr().err == "opd_jax: SIGTERM; the same command goes on from here\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_overrides_and_options_mix_and_reach_the_pipeline(config_path, pipeline):
    words = ["--config", config_path, "seed=3", "--stages", "sft, rollout", "sft.steps=2"]
    assert main([*words, "--force", "sft", "--force", "train,export"]) == 0
    ((config, stages, force, plan_only),) = pipeline.calls
    assert (config.seed, config.sft.steps) == (3, 2)
    assert (stages, force, plan_only) == (["sft", "rollout"], ["sft", "train", "export"], False)


def test_a_trace_is_taken_when_asked_for(config_path, pipeline):
    assert main(["--config", config_path]) == 0
    assert not pipeline.profile
    assert main(["--config", config_path, "--profile"]) == 0
    assert pipeline.profile


@pytest.mark.parametrize("stage", ["answer", "rollout", "score"])
def test_a_share_counts_from_one(config_path, pipeline, stage):
    words = ["--config", config_path, "--stages", stage]
    assert main([*words, "--share", "3/4"]) == 0
    assert pipeline.share == (2, 4)
    assert main(words) == 0
    assert pipeline.share is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stages", "score", "--share", "0/4"], "--share 0/4: give I/N"),
        (["--stages", "score", "--share", "5/4"], "--share 5/4: give I/N"),
        (["--stages", "score", "--share", "half"], "--share half: give I/N"),
        (["--share", "1/2"], "--share goes with one of"),
        (
            ["--stages", "rollout,score", "--share", "1/2"],
            "--share goes with one of",
        ),
        (["--stages", "sft", "--share", "1/2"], "--share goes with one of"),
        (["--stages", "score", "--share", "1/2", "--force", "score"], "not with --force"),
        (["--prompt", "x", "--share", "1/2"], "--prompt and --share do not go together"),
    ],
)
def test_a_share_that_makes_no_sense_is_refused(config_path, pipeline, words, expected, capsys):
    assert main(["--config", config_path, *words]) == 2
    assert expected in capsys.readouterr().err
    assert pipeline.calls == []


def test_without_stages_all_are_meant(config_path, pipeline):
    assert main(["--config", config_path, "--plan"]) == 0
    assert pipeline.calls[0][1:] == (None, [], True)


def test_a_users_mistake_is_one_line_and_exit_code_2(config_path, pipeline, capsys):
    pipeline.error = DataError("prompts.jsonl:3: broken\nJSON")
    assert main(["--config", config_path]) == 2
    assert capsys.readouterr().err == "opd_jax: error: prompts.jsonl:3: broken JSON\n"


def test_an_operating_system_error_names_its_file(config_path, pipeline, capsys):
    pipeline.error = PermissionError(13, "Permission denied", "/runs")
    assert main(["--config", config_path]) == 2
    assert capsys.readouterr().err == "opd_jax: error: /runs: Permission denied\n"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET])
def test_a_network_folder_that_fails_for_a_while_may_be_tried_again(
    config_path, pipeline, capsys, watcher, number
):
    error = OSError(number, os.strerror(number), "/shared/run")
    for pipeline.error in (error, unwritable("/shared/run", error)):
        pipeline.error.__cause__ = None if pipeline.error is error else error
        assert main(["--config", config_path]) == 1
        err = capsys.readouterr().err
        assert err.startswith("opd_jax: error: /shared/run: ")
        assert err.count("\n") == 1
        assert watcher.told == (err.removeprefix("opd_jax: error: ").rstrip(), 1)


def test_debug_shows_the_traceback(config_path, pipeline, capsys):
    pipeline.error = DataError("torn")
    assert main(["--config", config_path, "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("opd_jax: error: torn\n")


@pytest.fixture
def watcher(monkeypatch):
    """Of one of several processes; notes what the others are told."""

    class Watcher:
        told = None

        def failed(self, reason, code):
            self.told = reason, code

        def stop(self):
            pass

    found = Watcher()
    monkeypatch.setattr("opd_jax.main._watcher", lambda: found)
    return found


@pytest.mark.parametrize("words", [[], ["--debug"]])
def test_with_nobody_to_read_the_error_other_processes_are_told(
    config_path, pipeline, monkeypatch, watcher, words
):
    read, write = os.pipe()
    os.close(read)
    pipeline.error = BrokenPipeError(32, "Broken pipe")
    with open(write, "w", buffering=1) as nobody:
        monkeypatch.setattr(sys, "stderr", nobody)
        assert main(["--config", config_path, *words]) == 2
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            nobody.close()
    assert watcher.told == ("[Errno 32] Broken pipe", 2)


def test_ctrl_c_is_one_line(config_path, pipeline, capsys):
    pipeline.error = KeyboardInterrupt()
    assert main(["--config", config_path]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_on_one_of_several_processes_is_told_to_the_others(config_path, pipeline, watcher):
    pipeline.error = KeyboardInterrupt()
    assert main(["--config", config_path]) == 130
    assert watcher.told == ("interrupted", 130)


def test_a_bug_is_not_dressed_up_as_a_users_mistake(config_path, pipeline):
    pipeline.error = AssertionError("ours")
    with pytest.raises(AssertionError):
        main(["--config", config_path])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--config"),
        (["--config"], "expected one argument"),
        (["--config", "x", "--speed"], "--speed"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, expected, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("opd_jax: error: command line: ")
    assert expected in err
    assert err.count("\n") == 1


def test_processes_are_joined_before_the_pipeline_runs(config_path, pipeline, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *at, **_: pipeline.calls.append(at))
    words = ["--config", config_path, "--coordinator", "host:1", "--processes", "2", "--rank", "1"]
    assert main(words) == 0
    assert pipeline.calls[0] == ("host:1", 2, 1)
    assert len(pipeline.calls) == 2


def test_processes_that_cannot_join_are_one_line_and_may_be_restarted(
    config_path, pipeline, monkeypatch, capsys
):
    def refused(*_, **__):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Failed to start\nRPC server")

    monkeypatch.setattr(jax.distributed, "initialize", refused)
    words = ["--config", config_path, "--coordinator", "host:1", "--processes", "2", "--rank", "0"]
    assert main(words) == 1
    said = "process 0 of 2 cannot join at host:1 (UNKNOWN: Failed to start RPC server); process 0 "
    err = capsys.readouterr().err
    assert err.startswith(f"opd_jax: error: {said}")
    assert err.count("\n") == 1
    assert main(["--config", config_path, "--distributed"]) == 1
    assert "--distributed: the processes that the environment" in capsys.readouterr().err
    assert pipeline.calls == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--coordinator", "host:1", "--rank", "0"], "belong together"),
        (["--coordinator", "host:1", "--processes", "2", "--rank", "2"], "--rank 2 is not below"),
        (["--distributed", "--rank", "0"], "--distributed finds the processes itself"),
    ],
)
def test_half_given_processes_are_refused(config_path, pipeline, words, expected, capsys):
    assert main(["--config", config_path, *words]) == 2
    assert expected in capsys.readouterr().err
    assert pipeline.calls == []


def test_processes_that_are_not_there_are_not_found(config_path):
    command = [sys.executable, "-m", "opd_jax.main", "--config", config_path, "--distributed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]  # the CUDA plugin, where it is installed, has its own
    assert line.startswith("opd_jax: error: --distributed: the environment tells of no other")
    assert "Traceback" not in done.stderr


def test_a_misspelt_key_does_not_wait_for_jax(config_path):
    code = (
        "import sys; from opd_jax.main import main; "
        "code = main(sys.argv[1:]); sys.exit('jax' in sys.modules or code)"
    )
    command = [sys.executable, "-c", code, "--config", config_path, "sede=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("unknown key 'sede'; did you mean 'seed'?\n")


def test_the_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "opd_jax.main", "--config", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("opd_jax: error: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def tools(monkeypatch):
    """Store tools that only note their arguments."""
    from opd_jax.stages import store_tools

    calls = []
    for name, code in (("inspect", 0), ("verify", 3), ("gc", 0)):
        monkeypatch.setattr(
            store_tools,
            name,
            lambda *args, name=name, code=code: calls.append((name, *args)) or code,
        )
    return calls


@pytest.mark.parametrize(
    ("words", "call", "code"),
    [
        (["--inspect", "s"], ("inspect", "s", None), 0),
        (["--inspect", "s", "--tokenizer", "t"], ("inspect", "s", "t"), 0),
        (["--verify", "gs://b/s"], ("verify", "gs://b/s"), 3),
        (["--gc", "s"], ("gc", "s", None, False), 0),
        (["--gc", "s", "--older-than", "0.5", "--dry-run"], ("gc", "s", 0.5, True), 0),
    ],
)
def test_a_store_tool_needs_no_config_and_its_exit_code_is_ours(tools, pipeline, words, call, code):
    assert main(words) == code
    assert tools == [call]
    assert pipeline.calls == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--inspect", "s", "--verify", "s"], "--inspect and --verify do not go together"),
        (["--gc", "s", "--config", "c"], "--gc and --config do not go together"),
        (["--verify", "s", "--stages", "score"], "--verify and --stages do not go together"),
        (["--verify", "s", "--chat"], "--verify and --chat do not go together"),
        (["--verify", "s", "--prompt", "x"], "--verify and --prompt do not go together"),
        (["--verify", "s", "--processes", "2"], "--verify and --processes do not go together"),
        (["--verify", "s", "seed=1"], "--verify takes no config key: leave out 'seed=1'"),
        (["--verify", "s", "--tokenizer", "t"], "--tokenizer is for --inspect"),
        (["--inspect", "s", "--older-than", "3"], "--older-than is for --gc"),
        (["--config", "c", "--dry-run"], "--dry-run is for --gc"),
        (["--gc", "s", "--older-than", "-1"], "--older-than -1: give hours, 0 or more"),
        (["--gc", "s", "--older-than", "nan"], "--older-than nan: give hours, 0 or more"),
        (["--gc", "s", "--older-than", "soon"], "invalid float value: 'soon'"),
        (["--verify", " "], "--verify is empty; give it a folder"),
        (["--verify"], "expected one argument"),
    ],
)
def test_flags_that_do_not_fit_a_store_are_refused(tools, pipeline, words, expected, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert tools == pipeline.calls == []
