"""Checkpoints: Orbax writes the arrays, a digest of every file is written last.

    <directory>/<step>/state/            Orbax's files
    <directory>/<step>/complete.json     sha256 of each, every leaf's shape, the caller's meta

A step without `complete.json` was cut off: it is ignored, and removed by the next save. Orbax has
no checksum of array data, so `restore` compares every file with its digest before it uses a value.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from opd_jax.core.distributed import await_seen, from_first
from opd_jax.data.store_files import TENSORSTORE_ERRORS, StoreFiles, short_cause
from opd_jax.errors import DataError
from opd_jax.train.file_digests import file_digests, sha256_of

COMPLETE = "complete.json"


def save(
    directory: str | os.PathLike[str],
    step: int,
    tree: Any,
    meta: dict[str, Any],
    keep: int | None = None,
) -> None:
    """Saves one step and returns when it is complete. Called by every process.

    Args:
        tree: any pytree of arrays.
        meta: JSON values that `restore` gives back.
        keep: how many complete steps stay; `None` keeps all.

    Raises:
        DataError: the directory cannot be written.
    """
    _Save(Path(directory), step, tree, meta, keep).complete()


class _Save:
    """A step whose arrays are being written."""

    def __init__(
        self, directory: Path, step: int, tree: Any, meta: dict[str, Any], keep: int | None
    ) -> None:
        """Begins; `tree` may be donated or changed from now on."""
        self._directory, self._keep = directory, keep
        self._folder = _step_folder(directory, step)
        self._document = {"step": step, "meta": meta, "tree": _leaves(tree)}
        if jax.process_index() == 0:
            with _written(self._folder):
                _remove_step(self._folder)
        _barrier(f"checkpoint {step} begins")
        with _written(self._folder):
            self._response = ocp.save_async(str(self._folder / "state"), tree)

    def complete(self) -> None:
        """Returns when the step is there as a whole. Called by every process."""
        with _written(self._folder):
            self._response.result()
        _barrier(f"{self._folder.name} is written")
        with _written(self._folder, (OSError,)):  # not what collectives raise
            body = {**self._document, "files": file_digests(self._folder)}
        if jax.process_index() == 0:
            with _written(self._folder):
                StoreFiles(self._folder).write_document(COMPLETE, body)
                _prune(self._directory, self._keep)
        _barrier(f"{self._folder.name} is complete")


class Saver:
    """Saves while training goes on: one step at a time, and the last one before it is left.

    A step is complete as soon as its files are written and digested; among several processes, which
    have to agree on that, at the next `settle`.
    """

    def __init__(self, directory: Path, keep: int | None = None) -> None:
        self._directory, self._keep = directory, keep
        self._save: _Save | None = None
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Begins to save, once the save before is complete.

        Raises:
            DataError: the directory cannot be written.
        """
        self.finish()
        self._save = _Save(self._directory, step, tree, meta, self._keep)
        if jax.process_count() == 1:
            self._thread = Thread(target=self._complete, args=(self._save,))
            self._thread.start()

    def _complete(self, save: _Save) -> None:
        try:
            save.complete()
        except BaseException as error:
            self._error = error

    def settle(self) -> None:
        """Between two steps, on all processes: what failed in the background is raised here."""
        if self._thread is None or not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Waits until what was begun is complete.

        Raises:
            DataError: it could not be written; earlier steps are untouched.
        """
        save, thread, self._save, self._thread = self._save, self._thread, None, None
        if thread is not None:
            thread.join()
        elif save is not None:
            save.complete()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None:
            self._thread.join()  # what ends the run is told, not a save that failed beside it


@contextlib.contextmanager
def _written(
    folder: Path, errors: tuple[type[Exception], ...] = TENSORSTORE_ERRORS
) -> Generator[None]:
    try:
        yield
    except errors as error:  # Orbax hands them on as they are
        repair = "free space or choose another run_dir"
        raise DataError(f"{folder}: cannot be written ({short_cause(error)}); {repair}") from error


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The newest complete step, `None` where there is none."""
    steps = complete_steps(directory)
    return steps[-1] if steps else None


def newest_step(directory: str | os.PathLike[str]) -> int | None:
    """`latest_step` as process 0 finds it. Called by every process."""
    step = latest_step(directory)
    told = from_first("" if step is None else str(step))
    if not told:
        return None
    await_seen(lambda: int(told) in complete_steps(directory), str(directory))
    return int(told)


def complete_steps(directory: str | os.PathLike[str]) -> list[int]:
    """All complete steps, oldest first."""
    return sorted(int(found.parent.name) for found in Path(directory).glob(f"[0-9]*/{COMPLETE}"))


def restore(
    directory: str | os.PathLike[str], step: int | None, abstract_tree: Any
) -> tuple[Any, dict[str, Any], int]:
    """Restores one step, the newest when `step` is `None`. Called by every process.

    Args:
        abstract_tree: `jax.ShapeDtypeStruct` leaves; their shardings may be on another mesh.

    Returns:
        The tree, bit for bit as it was saved, the meta and the step.

    Raises:
        DataError: there is no such step, a file is damaged, or it holds another tree.
    """
    steps = complete_steps(directory)
    wanted = steps[-1] if step is None and steps else step
    if wanted is None or wanted not in steps:
        sought = "checkpoint" if step is None else f"checkpoint of step {step}"
        have = f"complete are {steps}" if steps else "run the stage that writes it first"
        raise DataError(f"{os.path.abspath(directory)}: no {sought}; {have}")
    folder = _step_folder(directory, wanted)
    older = [other for other in steps if other < wanted]
    go_on = f"go on from step {older[-1]}" if older else "begin again"
    document = _verified(folder, f"delete {folder} to {go_on}")
    _same_leaves(folder, document["tree"], _leaves(abstract_tree))
    tree = ocp.load(str(folder / "state"), abstract_tree)
    return tree, document["meta"], wanted


def meta_of(directory: str | os.PathLike[str], step: int) -> dict[str, Any]:
    """The meta of a complete step, without its arrays."""
    folder = _step_folder(directory, step)
    return StoreFiles(folder).read_document(COMPLETE, f"delete {folder}")["meta"]


def discard_others(directory: str | os.PathLike[str], step: int | None) -> None:
    """Removes all steps but one. Called by every process, process 0 does it."""
    if jax.process_index() == 0:
        for other in complete_steps(directory):
            if other != step:
                _remove_step(_step_folder(directory, other))


def _step_folder(directory: str | os.PathLike[str], step: int) -> Path:
    return Path(os.path.abspath(directory)) / f"{step:08d}"


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _remove_step(folder: Path) -> None:
    """Takes the mark away first: a kill in between leaves an incomplete step, not a broken one."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _prune(directory: Path, keep: int | None) -> None:
    """Removes what was cut off, and complete steps beyond the newest `keep`."""
    steps = complete_steps(directory)
    kept = {f"{step:08d}" for step in (steps if keep is None else steps[-keep:])}
    for folder in directory.glob("[0-9]*"):
        if folder.name not in kept:
            _remove_step(folder)


def _leaves(tree: Any) -> dict[str, str]:
    """Each leaf's name with its type and shape, as in `{"params/lm_head": "float32[64,512]"}`."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}[{','.join(str(size) for size in leaf.shape)}]"
        )
        for path, leaf in named
    }


def _same_leaves(folder: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Orbax would find a difference too, but only halfway, with its other reads under way."""
    for name in sorted(saved.keys() | wanted.keys()):
        have, want = saved.get(name, "nothing"), wanted.get(name, "nothing")
        if have != want:
            raise DataError(
                f"{folder}: holds another tree than this config makes ({name}: {have} there,"
                f" {want} here); use the config it was written with, or another run_dir"
            )


def _verified(folder: Path, repair: str) -> dict[str, Any]:
    """The step's document, once every file has been compared, each process doing a share.

    Raises:
        DataError: on every process, when one found damage.
    """
    problem = ""
    document: dict[str, Any] = {}
    try:
        document = StoreFiles(folder).read_document(COMPLETE, repair)
        names = sorted(document["files"])[jax.process_index() :: jax.process_count()]
        _compare(folder, {name: document["files"][name] for name in names}, repair)
    except DataError as error:
        problem = str(error)
    if jax.process_count() > 1:
        bad = multihost_utils.process_allgather(np.array(bool(problem)))
        if bad.any() and not problem:
            problem = f"{folder}: process {int(bad.argmax())} found damage; {repair}"
    if problem:
        raise DataError(problem)
    return document


def _compare(folder: Path, digests: dict[str, str], repair: str) -> None:
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: file is missing from checkpoint {folder.name}; {repair}")
        if sha256_of(path) != digest:
            raise DataError(f"{path}: damaged, its digest does not match; {repair}")
