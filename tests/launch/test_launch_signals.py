"""SIGTERM reaches Python, what can go on starts again, and exit code 2 starts nothing again."""

import signal
import time

import launchers
import pytest
from launchers import FOLDER, Host

SAVES = """#!/bin/bash
trap 'echo told > told; exit "$CODE"' TERM
echo $$ > pid
for _ in {1..600}; do sleep 0.05; done
"""
ENDS = """#!/bin/bash
exit "$CODE"
"""
SRUN = """#!/bin/bash
trap 'exit 99' TERM  # as srun does: the tasks would be killed
while [[ $1 == --* ]]; do shift; done
"$@" & wait $!
"""
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM 7" ] && kill -TERM "$(cat pid)"
"""


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def wait_for(path):
    until = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.01)


def slurm_job(host, python, code):
    host.tool("bin/python", python)
    host.tool("bin/srun", SRUN)
    host.tool("bin/scancel", SCANCEL)
    host.tool("bin/scontrol")
    return host.bash(FOLDER / "slurm.sbatch", CODE=str(code))


@pytest.mark.parametrize(
    ("code", "requeued", "job_code"), [(143, True, 0), (0, False, 0), (2, False, 2)]
)
def test_slurm_before_the_time_is_over(host, code, requeued, job_code):
    job = slurm_job(host, SAVES, code)
    wait_for(host.folder / "pid")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == job_code
    assert (host.folder / "told").exists()
    assert host.calls() == [["scontrol", "requeue", "7"]] * requeued


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_slurm_without_notice_starts_nothing_again(host, code):
    assert slurm_job(host, ENDS, code).wait(timeout=30) == code
    assert host.calls() == []


def test_slurm_gives_notice_early_enough():
    text = (FOLDER / "slurm.sbatch").read_text()
    assert "--signal=B:USR1@300" in text
    assert "{1..240}" in text  # seconds: the script is back before Slurm ends it
    assert "--requeue" in text


def test_xpk_sends_sigterm_to_python(host):
    """In a wrapper as XPK 1.16 has it (docker_container.py), but for its pause of 5 seconds."""
    command = launchers.xpk_command(host)
    host.tool("bin/python", SAVES)
    wrapper = host.bash(
        "-c",
        f"trap 'kill -TERM $!' TERM; ({command}) & job=$!; "
        "while kill -0 $job; do sleep 0.1; done 2>&-; wait $job",
        CODE="143",
    )
    wait_for(host.folder / "pid")
    wrapper.terminate()
    assert wrapper.wait(timeout=30) == 143
    assert (host.folder / "told").exists()


def test_xpk_restarts_except_after_2(host):
    host.tool("bin/xpk")
    [call] = host.run(FOLDER / "xpk.sh")
    assert int(launchers.option(call, "--max-restarts")) > 0
    assert launchers.option(call, "--restart-on-exit-codes") == "1,4"  # beside 42, 127 to 255
    assert int(launchers.option(call, "--termination-grace-period-seconds")) >= 120


def test_systemd_runs_python_itself_and_restarts_it_except_after_2(host):
    sudo = launchers.tpu_vm(host)
    assert sudo[:2] == ["sudo", "systemd-run"]
    program = next(word for word in sudo[2:] if not word.startswith("--"))
    assert program == f"{host.folder}/opd_jax/.venv/bin/python"
    properties = [word.removeprefix("--property=") for word in sudo if "--property=" in word]
    assert {"Restart=on-failure", "RestartPreventExitStatus=2"} <= {*properties}
    assert "--uid=somebody" in sudo


@pytest.mark.parametrize("file", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_kubernetes_runs_python_itself_and_restarts_it_except_after_2(file):
    assert launchers.container(file)["command"][0] == "python"
    policy = launchers.documents(file)[0]["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    [rule] = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = launchers.job_spec(file)
    assert job["podFailurePolicy"]["rules"] == [
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": launchers.container(file)["name"],
                "operator": "In",
                "values": [2],
            },
        }
    ]
    assert job["backoffLimit"] == 0
    assert job["parallelism"] == job["completions"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("file", ["sky_gpu.yaml", "sky_tpu.yaml"])
def test_skypilot_starts_again_what_saved_alone(file):
    [task] = launchers.documents(file)
    # 2: something to repair. 137: what SkyPilot notes for the other machines of such a job.
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [4, 143]}
    [mount] = task["file_mounts"].values()
    assert mount["mode"] == "MOUNT"
