"""One run at a time in a run folder, or at a share of a stage: two would do each other's work."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Generator
from pathlib import Path

from opd_jax.core.distributed import is_first
from opd_jax.errors import ConfigError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None


@contextlib.contextmanager
def run_lock(run_dir: Path, shared: bool = False) -> Generator[None]:
    """Hold the folder; the system lets go of it when the process ends, however it ends.

    Args:
        shared: hold it together with others that do so too.

    Process 0 holds it for all. A file system without locks is not guarded.

    Raises:
        ConfigError: another run holds it.
    """
    what, instead = f"run_dir '{run_dir}' is in use", "choose another run_dir"
    with _held(run_dir / ".lock", shared, what, instead):
        yield


@contextlib.contextmanager
def share_lock(folder: Path, name: str) -> Generator[None]:
    """Hold a share of a stage, as `run_lock` holds a run folder.

    Args:
        folder: one that every start of this share has before it.
        name: of the stage and the share.

    Raises:
        ConfigError: it is being done.
    """
    what = f"{name} in '{folder}' is being done"
    with _held(folder / f".{name}.lock", False, what, "start another share"):
        yield


@contextlib.contextmanager
def _held(path: Path, shared: bool, what: str, instead: str) -> Generator[None]:
    if fcntl is None or not is_first():
        yield
        return
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                raise ConfigError(
                    f"{what} by {file.read().strip() or 'another run'}; wait until it ends, or "
                    f"{instead}"
                ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
