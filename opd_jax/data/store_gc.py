"""Removes what killed writers leave behind: folders of segments that were never committed."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from opd_jax.data.store_files import StoreFiles
from opd_jax.data.store_layout import LOCK, StoreLayout, local_folder, look
from opd_jax.errors import DataError

DEFAULT_HOURS = 24.0


@dataclass(frozen=True)
class Orphan:
    """A segment's folder without a commit.

    Attributes:
        folder: its key below the root, ending in a slash.
        size: bytes; `None` where the store does not tell them.
        hours: since its newest file was written; `None` where the store does not tell that.
    """

    folder: str
    size: int | None
    hours: float | None


@dataclass(frozen=True)
class Collected:
    """What was removed (what would have been, in a dry run), and what is too young for it."""

    removed: list[Orphan]
    kept: list[Orphan]


def collect_garbage(
    files: StoreFiles, older_than_hours: float = DEFAULT_HOURS, dry_run: bool = False
) -> Collected:
    """Removes the segment folders without a commit that nobody has written to for so long.

    Whether there is a commit is asked once more right before the removal.

    Args:
        older_than_hours: a younger folder may be a living writer's.
        dry_run: removes nothing.

    Raises:
        DataError: the store does not tell how old its files are, or is of another schema version.
        OSError: a folder cannot be removed.
    """
    files.read_document("dataset.json", "there is no usable store: see what --verify says")
    layout = look(files)
    root = local_folder(files)
    found = [_orphan(root, layout, folder) for folder in layout.orphans]
    if root is None and found and not dry_run:
        raise DataError(
            f"{files.root}: does not tell how old its files are, so nothing is removed;"
            f" --dry-run lists the {len(found)} segment folders without a commit: delete those of"
            " dead writers with your storage's own tool"
        )
    old = [o for o in found if o.hours is None or o.hours >= older_than_hours]
    if root is not None and not dry_run:
        old = [orphan for orphan in old if _removed(files, root, orphan)]
    return Collected(old, [o for o in found if o not in old])


def _orphan(root: Path | None, layout: StoreLayout, folder: str) -> Orphan:
    hours = None if root is None else (time.time() - _newest(root, folder)) / 3600
    return Orphan(folder, layout.bytes_below(folder), hours)


def _commit_key(folder: str) -> str:
    base, name = folder.removesuffix("/").rsplit("data/", 1)
    return f"{base}commits/{name}.json"


def _newest(root: Path, folder: str) -> float:
    """When anything of the segment was last written, a commit on its way included."""
    paths = [root / folder, *(root / folder).rglob("*"), root / (_commit_key(folder) + LOCK)]
    return max(path.lstat().st_mtime for path in paths if path.exists())


def _removed(files: StoreFiles, root: Path, orphan: Orphan) -> bool:
    path = root / orphan.folder.removesuffix("/")
    if path.is_symlink() or files.exists(_commit_key(orphan.folder)):
        return False
    shutil.rmtree(path)
    return True
