"""Compiled programs are kept on disk, so that a second start does not wait for the compiler."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax

from opd_jax.errors import ConfigError

AUTO = "auto"
WORTH_SECONDS = 0.2  # what compiles faster than this is not kept
LIMIT_BYTES = 10 * 2**30  # of a folder of our own choice; what was used last stays


def keep_compiled(folder: str | None) -> None:
    """Tell JAX where to keep compiled programs. Must come before the first one is compiled.

    Args:
        folder: `None` keeps nothing. "auto" is the folder that JAX_COMPILATION_CACHE_DIR names,
            else one in the user's cache, of which there is one per kind of processor: homes are
            shared by machines of which not all have the same instructions. Without a home that
            can be written nothing is kept: nobody asked for it.

    Raises:
        ConfigError: a folder that was named cannot be made.
    """
    if folder is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder == AUTO:
        if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            return  # JAX has read that variable and those that go with it
        try:
            own = _user_cache() / "opd_jax" / "compiled" / processor()
            own.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # the latter: there is no home
            return
        folder = str(own)
        jax.config.update("jax_compilation_cache_max_size", LIMIT_BYTES)
    elif "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"compile_cache: {folder} cannot be made ({error.strerror}); name another folder, "
                "or null to keep no compiled programs"
            ) from error
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_SECONDS)


def processor() -> str:
    """A short name of this kind of processor: the same where the same instructions exist."""
    told = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    told += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return f"{platform.machine()}-{hashlib.sha256(' '.join(told).encode()).hexdigest()[:8]}"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
