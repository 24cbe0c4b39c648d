"""What compilers and runtimes are told, by platform."""

import subprocess
import sys
from pathlib import Path

import pytest

from opd_jax.core.platform_flags import (
    GPU_FLAGS,
    TPU_FLAGS,
    platform_here,
    set_flags,
    variables,
    with_flags,
)
from opd_jax.fit.topology import environment
from opd_jax.main import main

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


@pytest.mark.parametrize(
    ("files", "environ", "platform"),
    [
        ((), {}, "cpu"),
        (("dev/nvidia0", "dev/nvidiactl"), {}, "gpu"),
        (("dev/nvidiactl",), {}, "gpu"),
        (("dev/nvidia-caps",), {}, "cpu"),
        (("dev/accel0",), {}, "tpu"),
        (("dev/vfio/0", "dev/vfio/vfio"), {}, "tpu"),
        (("dev/vfio/vfio",), {}, "cpu"),  # the module is loaded, no device is bound
        ((), {"TPU_NAME": "slice"}, "tpu"),
        ((), {"TPU_WORKER_ID": "0"}, "tpu"),
        ((), {"TPU_NAME": ""}, "cpu"),
        (("dev/nvidia0",), {"JAX_PLATFORMS": "cpu"}, "cpu"),
        (("dev/accel0",), {"JAX_PLATFORMS": "cpu"}, "cpu"),
        ((), {"JAX_PLATFORMS": "cuda,cpu"}, "gpu"),
        ((), {"JAX_PLATFORMS": "tpu"}, "tpu"),
        ((), {"JAX_PLATFORMS": "rocm"}, "cpu"),
        (("dev/nvidia0",), {"JAX_PLATFORM_NAME": "cpu"}, "cpu"),
    ],
)
def test_the_platform_is_told_by_files_and_variables(tmp_path, files, environ, platform):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert platform_here(environ, tmp_path) == platform


def test_on_a_cpu_nothing_is_set():
    for environ in ({"JAX_PLATFORMS": "cpu"}, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a=b"}):
        before = dict(environ)
        set_flags(environ)
        assert environ == before


def flags_in(text):
    return dict(flag.removeprefix("--").split("=") for flag in text.split())


def test_on_accelerators_every_flag_is_set_once():
    found = variables("gpu", {})
    assert flags_in(found["XLA_FLAGS"]) == GPU_FLAGS
    assert found["XLA_CLIENT_MEM_FRACTION"] == "0.95"
    assert GPU_FLAGS
    assert flags_in(variables("tpu", {}).get("LIBTPU_INIT_ARGS", "")) == TPU_FLAGS
    again = variables("gpu", found)
    assert again == {"XLA_FLAGS": found["XLA_FLAGS"]}


def test_on_tpus_flags_go_to_libtpu(monkeypatch):
    monkeypatch.setitem(TPU_FLAGS, "xla_tpu_one", "true")
    given = {"LIBTPU_INIT_ARGS": "--xla_tpu_two=2", "XLA_FLAGS": "--a=b"}
    assert variables("tpu", given) == {"LIBTPU_INIT_ARGS": "--xla_tpu_two=2 --xla_tpu_one=true"}


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_the_users_share_of_memory_stays(name):
    environ = {"JAX_PLATFORMS": "cuda", name: "0.5"}
    set_flags(environ)
    assert environ.pop("XLA_FLAGS")
    assert environ == {"JAX_PLATFORMS": "cuda", name: "0.5"}


@pytest.mark.parametrize(
    ("given", "result"),
    [
        ("", "--one=true --two=2"),
        ("--one=false", "--one=false --two=2"),
        ("--one=false --other=3", "--one=false --other=3 --two=2"),
        ("--other=3  --noone", "--other=3  --noone --two=2"),
        ("-two=9 --one", "-two=9 --one"),
        ("--one_more=1", "--one_more=1 --one=true --two=2"),
        ("flags.txt", "flags.txt"),
    ],
)
def test_the_users_flags_win_one_by_one(given, result):
    assert with_flags(given, {"one": "true", "two": "2"}) == result


def test_a_run_sets_them_before_jax_is_there(tmp_path):
    """In a process of its own, told to be on GPUs; the run ends at once, for lack of any."""
    code = (
        "import os, sys\n"
        "from opd_jax.core import platform_flags\n"
        "old = platform_flags.set_flags\n"
        "def told():\n"
        "    old()\n"
        "    print('jax' in sys.modules, os.environ['XLA_FLAGS'])\n"
        "    raise KeyboardInterrupt\n"
        "platform_flags.set_flags = told\n"
        "from opd_jax.main import main\n"
        f"sys.exit(main(['--config', {QUICKSTART!r}, 'run_dir={tmp_path}']))\n"
    )
    env = {"JAX_PLATFORMS": "cuda", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130, done.stderr
    before, flags = done.stdout.strip().split(" ", 1)
    assert before == "False"
    assert flags_in(flags) == GPU_FLAGS


def test_a_run_on_a_cpu_leaves_the_environment_alone(tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before = dict(os.environ)
    assert main(["--config", QUICKSTART, f"run_dir={tmp_path}", "--plan"]) == 0
    changed = {name for name in os.environ if os.environ[name] != before.get(name)}
    assert not changed & {"XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_CLIENT_MEM_FRACTION"}


def test_fit_compiles_with_the_same_flags_and_the_users():
    given = "--xla_force_host_platform_device_count=4 --xla_gpu_enable_triton_gemm=false"
    made = environment({"XLA_FLAGS": given, "LIBTPU_INIT_ARGS": "--xla_tpu_my_flag=1"})
    assert flags_in(made["XLA_FLAGS"]) == GPU_FLAGS | {"xla_gpu_enable_triton_gemm": "false"}
    assert flags_in(made["LIBTPU_INIT_ARGS"]) == TPU_FLAGS | {"xla_tpu_my_flag": "1"}
    assert environment(made)["XLA_FLAGS"] == made["XLA_FLAGS"]
