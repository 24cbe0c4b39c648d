"""Which files lie below a store's root, and what each of them is.

A folder is walked, so that what TensorStore does not list (its own lock files, a folder without
files) is seen too. Other stores tell the names alone: neither sizes nor ages.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from opd_jax.data.store_files import StoreFiles, damage_named
from opd_jax.data.store_segments import commit_names
from opd_jax.errors import DataError

SEGMENT_NAME = r"w\d{5,}-\d{6,}-[0-9a-f]{8}"
_BASE = r"(?:teacher/[A-Za-z0-9][A-Za-z0-9._-]*/)?"
_ARRAY_FILE = r"(?:zarr\.json|c/\d+(?:/0)?)"
_KNOWN = re.compile(
    r"(?:dataset|shares)\.json|snapshots/[0-9a-f]{64}\.json|teacher/[^/]+/(?:pass|shares)\.json"
    r"|\.locks/[^/]+"
    rf"|{_BASE}commits/[^/]+\.json"
    rf"|{_BASE}data/{SEGMENT_NAME}/(?:records\.npz|[a-z_]+/{_ARRAY_FILE})"
)
_IN_SEGMENT = re.compile(rf"({_BASE})data/({SEGMENT_NAME})/(?:([a-z_]+)/)?")
LOCK = ".__lock"
"""How TensorStore names a file that it is about to put in another's place."""


@dataclass(frozen=True)
class StoreLayout:
    """The names below a root at one moment.

    Attributes:
        sizes: every file's bytes, `None` where the store does not tell them.
        passes: names of the teacher passes.
        orphans: folders of segments without a commit, each ending in a slash.
        foreign: files that are no part of a store.
        unfinished: what writes that never ended left behind.
    """

    sizes: dict[str, int | None]
    passes: list[str]
    orphans: list[str]
    foreign: list[str]
    unfinished: list[str]

    def bytes_below(self, folder: str) -> int | None:
        """Bytes of the files in `folder`, which ends in a slash."""
        sizes = [size for key, size in self.sizes.items() if key.startswith(folder)]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def kinds(self) -> dict[str, int | None]:
        """Bytes by what they hold: `student_logprob`, `teacher/big/topk_ids`, `documents`, ..."""
        found: dict[str, int | None] = {}
        orphans = tuple(self.orphans)
        for key, size in self.sizes.items():
            kind = "other files"
            if orphans and key.startswith(orphans):
                kind = "segments without a commit"
            elif match := _IN_SEGMENT.match(key):
                kind = match[1] + (match[3] or "records.npz")
            elif _KNOWN.fullmatch(key):
                kind = "documents"
            before = found.get(kind, 0)
            found[kind] = None if size is None or before is None else before + size
        return found


def local_folder(files: StoreFiles) -> Path | None:
    """The root as a folder; `None` for an address."""
    return None if "://" in files.root else Path(files.root)


def bases(passes: list[str]) -> list[str]:
    """Where segments may lie: the root itself, and every teacher pass."""
    return ["", *(f"teacher/{name}/" for name in passes)]


def look(files: StoreFiles) -> StoreLayout:
    """Lists a store.

    Raises:
        DataError: it cannot be listed.
    """
    sizes, folders = _walk(files)
    inside = [key.split("/") for key in sizes if key.startswith("teacher/")]
    # A name with a dot before it is a pass that --force has put aside.
    passes = sorted({p[1] for p in inside if len(p) > 2 and not p[1].startswith(".")})
    committed = {
        f"{base}data/{name}/" for base in bases(passes) for name in commit_names(files, base)
    }
    found = {match[0] for key in (*sizes, *folders) if (match := _segment_folder(key))}
    unknown = [key for key in sizes if not _KNOWN.fullmatch(key)]
    orphans = tuple(sorted(found - committed))
    outside = [key for key in unknown if not (orphans and key.startswith(orphans))]
    return StoreLayout(
        sizes=sizes,
        passes=passes,
        orphans=list(orphans),
        foreign=[key for key in outside if not key.endswith(LOCK)],
        unfinished=[key for key in outside if key.endswith(LOCK)],
    )


def _segment_folder(key: str) -> re.Match[str] | None:
    return re.match(rf"{_BASE}data/{SEGMENT_NAME}/", key)


def _walk(files: StoreFiles) -> tuple[dict[str, int | None], list[str]]:
    """Every file with its bytes, and the folders (each ending in a slash) where there are such."""
    root = local_folder(files)
    if root is None:
        with damage_named(files.root, "make it readable"):
            keys = files.kvstore.list().result()
        return dict.fromkeys(sorted(k.decode(errors="backslashreplace") for k in keys)), []
    sizes: dict[str, int | None] = {}
    folders: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        below = Path(folder).relative_to(root)
        folders += [(below / name).as_posix() + "/" for name in subfolders]
        for name in names:
            key = below / name
            try:
                sizes[key.as_posix()] = (root / key).lstat().st_size
            except FileNotFoundError:
                continue  # a writer at work has renamed it
    return dict(sorted(sizes.items())), folders


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise DataError(f"{error.filename}: {error.strerror}; make it readable") from error


def open_files(root: str) -> StoreFiles:
    """The files of an existing store, which is named if a run folder is given in its place.

    Raises:
        DataError: there is no store, or one of a schema version that is not known here.
    """
    files = StoreFiles(root)
    if files.exists("dataset.json") or commit_names(files, ""):
        return files
    inside = [name for name in ("rollouts", "answers") if files.exists(f"{name}/dataset.json")]
    if inside:
        names = " or ".join(files.path(name) for name in inside)
        raise DataError(f"{files.root}: is a run folder; give one of its stores: {names}")
    raise DataError(f"{files.root}: no store is there; give the folder that holds dataset.json")
