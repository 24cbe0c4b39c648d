"""The launchers start a command that this version understands, with files and extras that exist."""

import re
import subprocess
import tarfile
import tomllib
from pathlib import Path

import launchers
import pytest
from launchers import FOLDER, STARTED, Host

from opd_jax import main as command_line
from opd_jax.config_load import load_config

ROOT = FOLDER.parents[1]
TEXTS = {path.name: path.read_text() for path in FOLDER.iterdir()}


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_every_launcher_is_tested():
    assert {*TEXTS} - {*STARTED} == {"Dockerfile", "check.sh"}


@pytest.mark.parametrize("name", STARTED)
def test_it_starts_what_the_command_line_understands(name, host):
    called = STARTED[name](host)
    at = called.index("opd_jax.main")
    assert called[at - 1] == "-m"
    assert Path(called[at - 2]).name == "python"
    arguments = command_line._parse(called[at + 1 :])
    command_line._check_store_flags(arguments)
    command_line._check_flags(arguments)
    given = arguments.coordinator, arguments.processes, arguments.rank
    if name == "sky_gpu.yaml":  # nothing that JAX recognises is there
        assert (arguments.distributed, given) == (False, ("10.0.0.1:8476", 2, 1))
    else:
        assert (arguments.distributed, given) == (True, (None, None, None))
    config = load_config(ROOT / arguments.config, arguments.overrides)
    [run_dir] = [word[8:] for word in arguments.overrides if word.startswith("run_dir=")]
    assert config.run_dir == str(Path(run_dir).absolute())


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_vm.sh"])
def test_words_after_the_launcher_reach_the_command(name, host):
    host.tool("bin/srun"), host.tool("bin/gcloud"), host.tool("bin/sudo")
    words = ["start"] if name == "tpu_vm.sh" else []
    called = host.run(FOLDER / name, *words, "sft.steps=3", "answer.stop=['a b']")[-1]
    if name == "tpu_vm.sh":
        called = host.run("-c", launchers.option(called, "--command"))[-1]
    assert called[-2:] == ["sft.steps=3", "answer.stop=['a b']"]


@pytest.mark.parametrize("name", TEXTS)
def test_configs_and_extras_that_it_names_exist(name):
    text = TEXTS[name]
    for path in re.findall(r"\bconfigs/[\w/.]+\.yaml", text):
        assert (ROOT / path).is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"\.\[([\w,]+)\]|EXTRAS=([\w,]+)", text)
    extras = {extra for pair in named for extra in "".join(pair).split(",")}
    assert extras <= {*project["optional-dependencies"]}
    assert extras or name not in ("slurm.sbatch", "tpu_vm.sh", "sky_gpu.yaml", "sky_tpu.yaml")


def test_the_archive_for_tpu_vms_is_the_checkout_without_itself(host):
    # $TMPDIR of these tests lies in the folder that they start in.
    host.tool("bin/gcloud", '#!/bin/sh\n[ "$4" != scp ] || cp "$5" "$HOME/sent.tgz"\n')
    for name in ("opd_jax/main.py", ".git/HEAD", "runs/mine/run.json"):
        (host.folder / name).parent.mkdir(parents=True)
        (host.folder / name).touch()
    host.run(FOLDER / "tpu_vm.sh")
    with tarfile.open(host.folder / "sent.tgz") as sent:
        names = {*sent.getnames()}
    assert names == {".", "./bin", "./bin/gcloud", "./opd_jax", "./opd_jax/main.py", "./tmp"}
    assert not [*(host.folder / "tmp").iterdir()]


def test_the_shell_can_read_them(host):
    scripts = [path for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 4
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    host.tool("bin/gcloud")
    for action in ("start", "stop", "logs"):
        host.run(FOLDER / "tpu_vm.sh", action)
    remote = [launchers.option(call, "--command") for call in host.calls() if "ssh" in call]
    assert len(remote) == 5
    for command in remote:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    for file in ("sky_gpu.yaml", "sky_tpu.yaml"):
        [task] = launchers.documents(file)
        subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)


def test_the_options_of_slurm_stand_before_its_first_command():
    """Slurm reads none that come later."""
    lines = TEXTS["slurm.sbatch"].splitlines()
    first = next(at for at, line in enumerate(lines) if line and not line.startswith("#"))
    options = [at for at, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert options
    assert max(options) < first


def test_the_image_holds_all_that_the_package_is_built_from():
    copied = re.findall(r"^COPY (.*) \S+$", TEXTS["Dockerfile"], re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names == {"pyproject.toml", "README.md", "LICENSE", "opd_jax", "configs"}
    assert all((ROOT / name).exists() for name in names)
    assert "ENTRYPOINT" not in TEXTS["Dockerfile"]
