"""One run at a time in a run folder, a pass or a share of a stage: two would do the same work."""

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


def run_lock(run_dir: Path, shared: bool = False) -> contextlib.AbstractContextManager[None]:
    """Hold the folder, alone or together with others that do so too.

    Raises:
        ConfigError: another run holds it.
    """
    return file_lock(
        run_dir / ".lock", f"run_dir '{run_dir}'", "choose another run_dir", shared=shared
    )


@contextlib.contextmanager
def file_lock(path: Path, what: str, otherwise: str, *, shared: bool = False) -> Generator[None]:
    """Hold a file; the system lets go of it when the process ends, however it ends.

    Args:
        what: what it guards, for the message.
        otherwise: what can be done beside waiting.
        shared: hold it together with others that do so too.

    Process 0 holds it for all. A file system without locks is not guarded.

    Raises:
        ConfigError: another run holds it.
    """
    if fcntl is None or not is_first():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                raise ConfigError(
                    f"{what} is in use by {file.read().strip() or 'another run'}; "
                    f"wait until it ends, or {otherwise}"
                ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
