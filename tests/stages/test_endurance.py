"""Training survives what machines do to it: ends at any moment, a full disk, damage, a new mesh."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forks import start_run
from processes import LIMIT_SECONDS, free_port, quick_environment
from safetensors.numpy import load_file
from tiny_run import ROOT, arguments

from opd_jax.main import main
from opd_jax.train.sources import offline_source

TIMES = ("step_seconds", "tokens_per_second", "data_wait", "memory_gib", "mfu")
STATE = "checkpoints/opd/state"
SETTINGS = ("prompts.opd_limit=40", "train.runs.opd.steps=6", "train.runs.opd.eval_every=2")
TRAIN = (*SETTINGS, "--stages", "train.opd,export.opd")


def weights(run_dir):
    lineage = json.loads((run_dir / "checkpoints" / "opd" / "lineage.json").read_text())
    return lineage["model"]["weights"]


def metrics(run_dir):
    """The lines of the run without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in lines
        if line["run"] == "opd"
    ]


def record(run_dir):
    return json.loads((run_dir / "stages" / "train.opd.json").read_text())


@pytest.mark.slow
def test_ended_twenty_times_a_run_has_the_bits_of_an_undisturbed_one(scored, tmp_path):
    script = Path(__file__).with_name("kill_training.py")
    command = [sys.executable, str(script), str(tmp_path), str(scored)]
    env = quick_environment()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stderr + log
    told = json.loads(done.stdout.splitlines()[-1])
    ends, straight, killed = told["ends"], tmp_path / "straight", tmp_path / "killed"
    print([(end["code"], end["saved"], round(end["seconds"], 1)) for end in ends])
    assert [end["code"] for end in ends] == [-signal.SIGKILL, 143] * 10
    assert weights(killed) == weights(straight) == weights(tmp_path / "first")
    lines = metrics(killed)
    assert lines == metrics(straight)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(60))
    reports = [line["step"] for line in lines if "loss" not in line]
    assert reports == [-1, *range(2, 60, 3)]
    assert record(killed)["counts"]["best_step"] > 30
    for part in ("inputs", "outputs", "counts"):
        assert record(killed)[part] == record(straight)[part]
    saves = re.findall(r"opd_jax: SIGTERM: step (\d+) is saved in .*; the same command goes", log)
    # The state of the last step is saved by the training itself.
    whole = {end["saved"] for end in ends if end["code"] == 143 and end["after_step"]} - {60}
    assert len(whole) > 4
    assert set(map(str, whole)) <= set(saves)
    counted = sum(end["seconds"] for end in ends if end["code"] == 143)
    everything = sum(end["seconds"] for end in ends) + told["last"]
    # Each is measured from a little after the stage noted its start; -9 forgets up to 5 seconds.
    assert counted - 0.5 < record(killed)["seconds"] < everything + 0.5


def start(run_dir, devices, *more):
    """A process of its own on so many devices."""
    return start_run(arguments(run_dir, *more), devices, cwd=ROOT, merged=False)


def finish(process, code=0):
    """What the process said at its end, on its error stream."""
    got, errors = ended(process)
    assert got == code, errors
    return errors


def ended(process):
    """The exit code of a process, and its error stream."""
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    return process.returncode, errors.decode()


@pytest.fixture(scope="module")
def scored(after_sft, tmp_path_factory):
    """A run folder whose training comes next."""
    run_dir = shutil.copytree(after_sft, tmp_path_factory.mktemp("endurance") / "scored")
    finish(start(run_dir, 1, *SETTINGS, "--stages", "rollout,score"))
    return run_dir


@pytest.fixture(scope="module")
def straight(scored):
    """The same folder, trained by one process on one device."""
    run_dir = shutil.copytree(scored, scored.with_name("straight"))
    finish(start(run_dir, 1, *TRAIN))
    return run_dir


def cut(run_dir, step):
    """As if the run had been killed after the save of a step."""
    for folder in (run_dir / STATE).iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    for folder in ("checkpoints/opd/model", "export"):
        shutil.rmtree(run_dir / folder)
    done = json.loads((run_dir / "stages" / "train.opd.json").read_text())
    note = {name: done[name] for name in ("inputs", "seconds", "device_seconds")}
    (run_dir / "stages" / "train.opd.started.json").write_text(json.dumps(note))
    for name in ("train", "export"):
        (run_dir / "stages" / f"{name}.opd.json").unlink()


@pytest.mark.slow
def test_training_goes_on_on_another_mesh(straight, tmp_path):
    """Saved on one device and gone on with on four, and back: the parameters within 1e-5."""
    four, mesh = shutil.copytree(straight, tmp_path / "four"), ("mesh.fsdp=2", "mesh.tensor=2")
    cut(four, 5)
    finish(start(four, 4, *SETTINGS, *mesh, "--stages", "train.opd,export.opd"))
    assert_close(four, straight)
    seconds, device = (record(four)[name] for name in ("seconds", "device_seconds"))
    before = record(straight)["seconds"]
    assert device == pytest.approx(before + 4 * (seconds - before), abs=0.01)
    cut(four, 5)
    finish(start(four, 1, *TRAIN))
    assert_close(four, straight)


@pytest.mark.slow
def test_two_processes_are_told_to_end_and_one_goes_on(scored, straight, tmp_path):
    """SIGTERM reaches one of them alone; both save the same step, and leave."""
    for number in range(5):
        two = shutil.copytree(scored, tmp_path / f"two{number}")
        codes, said = zip(*map(ended, told(two)), strict=True)
        newest = max(int(path.parent.name) for path in (two / STATE).glob("*/complete.json"))
        if newest < 6:
            break  # they were told before they came to their end
    assert codes == (143, 143), said
    found = [re.findall(r"SIGTERM: step (\d+) is saved in .*goes on from here\n", x) for x in said]
    assert found[0] == found[1] == [str(newest)]
    assert newest < 6
    finish(start(two, 1, *TRAIN))
    assert_close(two, straight)


def told(run_dir):
    """Two processes, of which one has got SIGTERM after the first save."""
    flags = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2")
    pair = [start(run_dir, 1, *TRAIN, *flags, "--rank", str(rank)) for rank in range(2)]
    deadline = time.monotonic() + LIMIT_SECONDS
    while not any((run_dir / STATE).glob("*/complete.json")):
        assert pair[0].poll() in (None, 0), pair[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    pair[1].send_signal(signal.SIGTERM)
    return pair


def assert_close(run_dir, straight):
    """Metrics and saved parameters, which are rounded in another order."""
    wanted = metrics(straight)
    for line, want in zip(metrics(run_dir), wanted, strict=True):
        assert line.keys() == want.keys()
        for name, value in want.items():
            near = isinstance(value, float)
            assert line[name] == (pytest.approx(value, rel=1e-4, abs=1e-4) if near else value)
    got, want = map(model_of, (run_dir, straight))
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_training_goes_on_from_the_last_checkpoint(straight, tmp_path):
    run_dir = shutil.copytree(straight, tmp_path / "full")
    cut(run_dir, 5)
    largest = max(path.stat().st_size for path in (run_dir / STATE).rglob("*"))
    process = start(run_dir, 1, *TRAIN)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest // 2,) * 2)
    errors = finish(process, 2)
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if "rror" in line]
    assert line.startswith(f"opd_jax: error: {run_dir}/{STATE}/00000006: cannot be written (")
    assert line.endswith("); free space or choose another run_dir")
    finish(start(run_dir, 1, *TRAIN))
    assert weights(run_dir) == weights(straight)
    assert metrics(run_dir) == metrics(straight)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["flipped", "truncated"])
def test_a_damaged_checkpoint_is_named_and_the_repair_goes_on_from_the_one_before(
    straight, tmp_path, harm
):
    run_dir = shutil.copytree(straight, tmp_path / "damaged")
    cut(run_dir, 6)
    newest = run_dir / STATE / "00000006"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 4
    largest.write_bytes(raw if harm == "flipped" else raw[:-1])
    errors = finish(start(run_dir, 1, *TRAIN), 2)
    (line,) = [line for line in errors.splitlines() if "rror" in line]
    assert line.startswith(f"opd_jax: error: {largest}: damaged")
    (folder,) = re.findall(r"; delete (\S+) to go on from step 5$", line)
    assert folder == str(newest)
    shutil.rmtree(folder)
    finish(start(run_dir, 1, *TRAIN))
    assert weights(run_dir) == weights(straight)
    assert metrics(run_dir) == metrics(straight)


@pytest.fixture
def poisoned(monkeypatch):
    """A stored score of step 2 is NaN."""

    def wrapped(*given):
        source = offline_source(*given)

        def start(step):
            next_batch = source.start(step)

            def harmed(step, current):
                batch = next_batch(step, current)
                return batch | {"teacher_bt": batch["teacher_bt"] * (np.nan if step == 2 else 1)}

            return harmed

        return source._replace(start=start)

    monkeypatch.setattr("opd_jax.stages.train.offline_source", wrapped)


@pytest.mark.slow
def test_a_score_that_is_nan_names_its_records_and_can_be_skipped(
    scored, tmp_path, capsys, poisoned
):
    run_dir = shutil.copytree(scored, tmp_path / "poisoned")
    words = arguments(run_dir, *TRAIN, "mesh.fsdp=1", "mesh.data=4")
    assert main(words) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("opd_jax: error: step 2: loss nan, gradient norm nan, update ratio 0")
    named = re.search(r", of ('opd-\d+'/0, ){2}'opd-\d+'/0 and 5 more \(all in (\S+)\); the", line)
    assert named is not None
    assert "\n" not in line
    assert max(int(path.name) for path in (run_dir / STATE).iterdir()) == 2
    assert main([*words, "train.runs.opd.on_nonfinite=skip"]) == 0
    assert record(run_dir)["counts"]["skipped"] == 1
    steps = {line["step"]: line.get("skipped") for line in metrics(run_dir) if "loss" in line}
    assert steps == {0: None, 1: None, 2: 1.0, 3: None, 4: None, 5: None}
    assert all(np.isfinite(value).all() for value in model_of(run_dir).values())


def model_of(run_dir):
    return load_file(run_dir / "export" / "opd" / "model.safetensors")
