"""What each launcher starts, found by running it among stand-ins for the tools of its platform."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[2] / "scripts" / "launch"
NOTE = f"""#!{sys.executable} -SE
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
"""


class Host:
    """A folder to start in, with stand-ins for programs, which note how they were called."""

    def __init__(self, folder):
        self.folder = folder
        self.calls_file = folder / "calls"
        for name in ("bin", ".venv/bin", "tmp"):
            (folder / name).mkdir(parents=True)
        (folder / ".venv/bin/activate").write_text("")
        self.environ = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "HOME": str(folder),
            "USER": "somebody",
            "TMPDIR": str(folder / "tmp"),
            "CALLS": str(self.calls_file),
            "SLURM_JOB_ID": "7",
        }

    def tool(self, path, text=NOTE):
        file = self.folder / path
        file.write_text(text)
        file.chmod(0o755)

    def bash(self, *arguments, **environ):
        """Start bash in the folder."""
        return subprocess.Popen(
            ["bash", *map(str, arguments)], cwd=self.folder, env=self.environ | environ
        )

    def calls(self):
        if not self.calls_file.exists():
            return []
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]

    def run(self, *arguments, **environ):
        """What was called, when bash has ended well."""
        assert self.bash(*arguments, **environ).wait(timeout=60) == 0
        return self.calls()


def slurm(host):
    host.tool("bin/srun")
    return host.run(FOLDER / "slurm.sbatch")[-1]


def tpu_vm(host):
    host.tool("bin/gcloud")
    remote = option(host.run(FOLDER / "tpu_vm.sh")[-1], "--command")
    host.tool("bin/sudo")
    return host.run("-c", remote)[-1]


def xpk_command(host):
    host.tool("bin/xpk")
    return option(host.run(FOLDER / "xpk.sh")[-1], "--command")


def xpk(host):
    command = xpk_command(host)
    host.tool("bin/python")
    return host.run("-c", command)[-1]


def kubernetes(file):
    def started(host):
        environ = {entry["name"]: entry["value"] for entry in container(file)["env"]}
        return [
            re.sub(r"\$\((\w+)\)", lambda found: environ[found[1]], word)
            for word in container(file)["command"]
        ]

    return started


def skypilot(file):
    def started(host):
        host.tool(".venv/bin/python")
        task = yaml.safe_load((FOLDER / file).read_text())
        nodes = {
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": "1",
        }
        return host.run("-c", task["run"], **task["envs"], **nodes)[-1]

    return started


STARTED = {
    "slurm.sbatch": slurm,
    "tpu_vm.sh": tpu_vm,
    "xpk.sh": xpk,
    "gke_tpu.yaml": kubernetes("gke_tpu.yaml"),
    "gke_gpu.yaml": kubernetes("gke_gpu.yaml"),
    "sky_gpu.yaml": skypilot("sky_gpu.yaml"),
    "sky_tpu.yaml": skypilot("sky_tpu.yaml"),
}


def option(call, name):
    """The value of `--name=value` in a call."""
    [value] = [word.removeprefix(f"{name}=") for word in call if word.startswith(f"{name}=")]
    return value


def documents(file):
    return list(yaml.safe_load_all((FOLDER / file).read_text()))


def job_spec(file):
    """The Job of a JobSet's only part."""
    [part] = documents(file)[0]["spec"]["replicatedJobs"]
    return part["template"]["spec"]


def container(file):
    [only] = job_spec(file)["template"]["spec"]["containers"]
    return only
