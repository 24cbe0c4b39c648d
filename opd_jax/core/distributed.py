"""Several processes as one program."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from opd_jax.core import liveness
from opd_jax.errors import ConfigError, DataError, JoinError

TEXT_BYTES = 256
LOOKS, LOOK_SECONDS = 60, 2.0
"""How often processes look until they see the same, and the time between two looks."""
HEARTBEAT_SECONDS = 80
"""After half of it to all of it JAX aborts who has lost another; `liveness` comes before."""


def start(
    coordinator: str | None, processes: int | None, rank: int | None, *, found: bool = False
) -> None:
    """Join the other processes, if there are any. Must come before any device is touched.

    Args:
        found: JAX finds them in the environment: those of a TPU slice, of a Slurm step (srun), of
            a Kubernetes JobSet or of mpirun.

    Raises:
        ConfigError: the three flags are not given together, or do not fit together; or the
            environment does not tell of other processes.
        JoinError: JAX cannot start to join them. (Where it has waited for them in vain,
            `liveness.joining` ends the process.)
    """
    given = [value is not None for value in (coordinator, processes, rank)]
    if found or all(given):
        # CPUs run programs that were dispatched side by side in any order; two processes that meet
        # in the collectives of different programs would wait for each other for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if found:
        if any(given):
            raise ConfigError(
                "--distributed finds the processes itself; leave out --coordinator, --processes "
                "and --rank, or it"
            )
        _join_found()
        return
    if not any(given):
        return
    if not all(given) or processes is None or rank is None:
        raise ConfigError("--coordinator, --processes and --rank belong together: give all three")
    if not 0 <= rank < processes:
        raise ConfigError(f"--rank {rank} is not below --processes {processes}")
    _join(
        f"process {rank} of {processes} cannot join at {coordinator}", coordinator, processes, rank
    )


def _join(what: str, *given: str | int | None) -> None:
    """Join the processes given, or those that JAX finds; `what` begins the message if it fails."""
    try:
        with liveness.joining():
            jax.distributed.initialize(
                *given,  # pyright: ignore
                initialization_timeout=liveness.JOIN_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except RuntimeError as error:
        raise JoinError(
            f"{what} ({error}); process 0 needs a free port, and the others must reach it; look at "
            "what they print, and start the same command on every host again"
        ) from error
    liveness.watch()


def _join_found() -> None:
    try:
        _join("--distributed: the processes that the environment tells of cannot join")
    except ValueError as error:  # of JAX, where no cluster that it knows is recognised
        raise ConfigError(
            "--distributed: the environment tells of no other processes (no TPU slice, Slurm step, "
            "Kubernetes JobSet or mpirun); start it with one of these, or give --coordinator, "
            "--processes and --rank"
        ) from error


def everyone(text: str) -> list[str]:
    """A short text of each process, in the order of their ranks, on every process."""
    if jax.process_count() == 1:
        return [text]
    gathered = np.asarray(multihost_utils.process_allgather(_padded(text)))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in gathered]


def _padded(text: str) -> np.ndarray:
    data = np.frombuffer(text.encode()[:TEXT_BYTES], np.uint8)
    return np.pad(data, (0, TEXT_BYTES - len(data)))


def agreed(see: Callable[[], np.ndarray], where: str) -> np.ndarray:
    """What all processes see alike, bool [n]: each looks again until they do.

    A folder on a network may hide for a while from one host what another has put there. Processes
    that go on from different lists would meet in the collectives of different batches.

    Args:
        see: bool [n], the same n on every process.
        where: what is looked at, for the message.

    Raises:
        DataError: they still differ after two minutes.
    """
    for _ in range(LOOKS):
        seen = see()
        if jax.process_count() == 1:
            return seen
        all_seen = np.asarray(multihost_utils.process_allgather(np.packbits(seen)))
        if (all_seen == all_seen[0]).all():
            return seen
        time.sleep(LOOK_SECONDS)
    raise _seen_apart(where)


def await_seen(see: Callable[[], bool], where: str) -> None:
    """Wait until this process sees what process 0 has seen, for the reason that `agreed` has.

    Raises:
        DataError: it does not within two minutes.
    """
    for _ in range(LOOKS):
        if see():
            return
        time.sleep(LOOK_SECONDS)
    raise _seen_apart(where)


def _seen_apart(where: str) -> DataError:
    return DataError(
        f"{where}: after {LOOKS * LOOK_SECONDS:.0f} s hosts still see different files there; put it"
        " where all hosts see the same files, or wait and start the same command again"
    )


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_first() -> bool:
    """Whether this process writes the shared files."""
    return jax.process_index() == 0


def from_first(text: str) -> str:
    """Process 0's value of a short text, on every process."""
    if jax.process_count() == 1:
        return text
    shared = np.asarray(multihost_utils.broadcast_one_to_all(_padded(text)))
    return bytes(shared).rstrip(b"\0").decode()
