"""One of two processes is killed, or fails: the other one names it and ends, and both go on."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
from forks import MODULE, start_run
from processes import LIMIT_SECONDS, free_port
from safetensors.numpy import load_file
from test_kill import TRIES, inside
from test_processes import assert_same_samples, losses
from tiny_run import ROOT, arguments

from opd_jax.core import liveness

RUN = "train.enabled=[opd]"
# (stage, who is killed): process 0, with which the coordination service goes, and the other one.
KILLS = (
    *(("answer", 1), ("sft", 0), ("rollout", 1), ("score", 0), ("train.opd", 1)),
    *(("evaluate.opd", 1), ("export.opd", 0)),
)
EVALUATE = ("evaluate.base=false", "evaluate.teacher=false")
ALL = (*EVALUATE, "--stages", "answer,sft,rollout,score,train,evaluate,export")
TRAINED = ("--stages", "answer,sft,rollout,score,train,export")
STORES = {"rollout": "rollouts", "score": "rollouts/teacher/*"}
# The same program, with less patience.
HASTY = (
    "import sys; from opd_jax.core import liveness; liveness.SILENT_SECONDS = 8.0; "
    "from opd_jax.main import main; sys.exit(main())"
)


def start(run_dir, *words, processes=2, devices=1, program=MODULE):
    """Processes with so many devices each."""
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)]
    words = [*arguments(run_dir, RUN, *words), *flags, "--rank"]
    return [
        start_run([*words, rank], devices, cwd=ROOT, program=program) for rank in range(processes)
    ]


def said(process):
    return process.communicate(timeout=LIMIT_SECONDS)[0].decode()


def finish(run_dir, processes, *words):
    for process in start(run_dir, *words, processes=processes):
        output = said(process)
        assert process.returncode == 0, output


def inside_of(run_dir, stage, *words, **kinds):
    """Processes in the middle of a stage."""
    pair = start(run_dir, *words, **kinds)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not inside(run_dir, stage):
        if (run_dir / "stages" / f"{stage}.json").exists():
            break  # it was faster than a look
        ended = any(process.poll() is not None for process in pair)
        if ended or time.monotonic() > deadline:
            for process in pair:
                process.kill()
            pytest.fail("\n".join([f"{stage} never began", *map(said, pair)]))
        time.sleep(0.002)
    return pair


def kill_one(run_dir, stage, rank, program):
    """What the other one says, its exit code, and how many seconds after the kill it ends.

    Once more from before if the stage was faster than the kill.
    """
    before = run_dir.with_name("before")
    for _ in range(TRIES):
        shutil.rmtree(before, ignore_errors=True)
        if run_dir.exists():
            shutil.copytree(run_dir, before)
        found = kill_one_inside(run_dir, stage, rank, program)
        if not (run_dir / "stages" / f"{stage}.json").exists():
            return found
        shutil.rmtree(run_dir)
        if before.exists():
            before.rename(run_dir)
    pytest.fail(f"{stage} was over before the kill, {TRIES} times")


def kill_one_inside(run_dir, stage, rank, program):
    pair = inside_of(run_dir, stage, *ALL, program=program)
    pair[rank].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    other = pair[1 - rank]
    output = said(other)
    seconds = time.monotonic() - killed
    said(pair[rank])
    return output, other.returncode, seconds


def parameters(run_dir):
    return load_file(run_dir / "export" / "opd" / "model.safetensors")


def evaluated(run_dir):
    """What is found of the student after SFT and of the trained one: figures and samples."""
    return {
        name: (
            json.loads((run_dir / "stages" / f"evaluate.{name}.json").read_text())["outputs"],
            (run_dir / "evaluate" / name / "samples.jsonl").read_text(),
        )
        for name in ("sft", "opd")
    }


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The folder of a run of two processes up to SFT; to be copied."""
    run_dir = tmp_path_factory.mktemp("lost_process") / "student"
    finish(run_dir, 2, "--stages", "answer,sft")
    return run_dir


@pytest.mark.slow
def test_one_of_two_is_killed_in_each_stage(student, tmp_path):
    straight, killed = shutil.copytree(student, tmp_path / "straight"), tmp_path / "killed"
    finish(straight, 2, *ALL)
    for stage, rank in KILLS:
        program = MODULE if stage == "answer" else ("-c", HASTY)
        output, code, seconds = kill_one(killed, stage, rank, program)
        assert seconds < 60, stage
        last = output.rstrip().splitlines()[-1]
        assert last.startswith(f"opd_jax: error: process {rank} ("), output
        assert last.endswith("on every host again, it goes on from here"), output
        # JAX itself aborts who has lost the coordination service, with a trace before that line.
        assert code == (-signal.SIGABRT if rank == 0 else liveness.LOST), output
        if rank > 0:
            assert "Traceback" not in output
        if stage == "train.opd":
            one = shutil.copytree(killed, tmp_path / "one")
    finish(killed, 2, *ALL)
    want = parameters(straight)
    assert_same_samples(straight, killed)
    assert evaluated(killed) == evaluated(straight)
    assert losses(killed) == losses(straight)
    for name, value in parameters(killed).items():
        assert np.array_equal(value, want[name]), name
    four = tmp_path / "four"
    (alone,) = inside_of(four, "train.opd", *TRAINED, processes=1, devices=2)
    alone.kill()
    said(alone)
    for run_dir, processes in ((one, 1), (four, 4)):  # from two, and from one
        finish(run_dir, processes, *TRAINED)
        for name, value in parameters(run_dir).items():
            np.testing.assert_allclose(value, want[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_what_one_of_two_cannot_do_ends_the_other_with_its_line(student, tmp_path):
    """Process 1 alone finds its disk full, as it seems to it."""
    spoilt = (
        "import sys; from opd_jax.errors import DataError\n"
        "from opd_jax.stages import rollout\n"
        "def run(ctx): raise DataError('the disk of this host is full')\n"
        "if sys.argv[-1] == '1': rollout.run = run\n"
        "from opd_jax.main import main; sys.exit(main())"
    )
    run_dir = shutil.copytree(student, tmp_path / "run")
    pair = start(run_dir, "--stages", "rollout", program=("-c", spoilt))
    outputs = [said(process) for process in pair]
    assert [process.returncode for process in pair] == [2, 2], "\n".join(outputs)
    assert outputs[1].rstrip().endswith("opd_jax: error: the disk of this host is full")
    last = outputs[0].rstrip().splitlines()[-1]
    assert last.startswith("opd_jax: error: process 1 (")
    assert ") failed: the disk of this host is full; start the same command" in last


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "prompts", "slots"), [("rollout", 600, 4), ("score", 320, 32)])
def test_sigterm_to_one_of_two_ends_both_between_two_batches(
    student, tmp_path, stage, prompts, slots
):
    """What is finished is committed; there is much more to do than the notice takes."""
    run_dir = shutil.copytree(student, tmp_path / "run")
    sizes = (f"prompts.opd_limit={prompts}", f"rollout.slots={slots}", "score.batch_tokens=136")
    pair = inside_of(run_dir, stage, *sizes, "--stages", "rollout,score")
    pair[1].send_signal(signal.SIGTERM)
    for process in pair:
        output = said(process)
        assert process.returncode == 143, output
        assert output.rstrip().endswith("opd_jax: SIGTERM; the same command goes on from here")
    assert not (run_dir / "stages" / f"{stage}.json").exists()
    commits = {path.name for path in run_dir.glob(f"{STORES[stage]}/commits/*.json")}
    assert len(commits) >= 2
