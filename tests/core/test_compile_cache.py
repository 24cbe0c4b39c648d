"""Compiled programs are kept, and found again by the next process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from opd_jax.core.compile_cache import keep_compiled, processor
from opd_jax.errors import ConfigError

CODE = """
import sys, time
import jax, jax.numpy as jnp
from opd_jax.core import compile_cache
compile_cache.WORTH_SECONDS = 0.0
compile_cache.keep_compiled(None if sys.argv[1] == "null" else sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
assert float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).sum()) > 0
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def compile_twice(setting, home, **variables):
    """How many programs each of two processes found, one after the other."""
    drop = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env |= {"XDG_CACHE_HOME": str(home), **variables}
    command = [sys.executable, "-c", CODE, setting]
    return [
        int(subprocess.run(command, env=env, check=True, capture_output=True).stdout)
        for _ in range(2)
    ]


def test_a_named_folder_keeps_programs(tmp_path):
    first, second = compile_twice(str(tmp_path / "kept"), tmp_path / "home")
    assert first == 0 < second
    assert any((tmp_path / "kept").iterdir())
    assert not (tmp_path / "home").exists()


def test_auto_keeps_them_in_the_users_cache_by_processor(tmp_path):
    first, second = compile_twice("auto", tmp_path)
    assert first == 0 < second
    assert any((tmp_path / "opd_jax" / "compiled" / processor()).iterdir())


def test_auto_leaves_a_folder_of_the_environment(tmp_path):
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    first, second = compile_twice("auto", tmp_path / "home", **own)
    assert first == 0 < second
    assert any((tmp_path / "own").iterdir())
    assert not (tmp_path / "home").exists()


def test_auto_without_a_home_that_can_be_written_keeps_none(tmp_path):
    (tmp_path / "file").touch()
    assert compile_twice("auto", tmp_path / "file") == [0, 0]


def test_null_keeps_none(tmp_path):
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    assert compile_twice("null", tmp_path / "home", **own) == [0, 0]
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"compile_cache: .*file/x cannot be made .* or null"):
        keep_compiled(str(tmp_path / "file" / "x"))
