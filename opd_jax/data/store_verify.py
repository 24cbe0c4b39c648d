"""Reads all of a store and names everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from opd_jax.data.store_files import SchemaVersionError, StoreFiles
from opd_jax.data.store_layout import StoreLayout, look
from opd_jax.data.store_segments import Segment, SegmentCache, commit_names
from opd_jax.data.store_snapshot import RecordOrder, Snapshot
from opd_jax.data.store_verify_pass import check_pass
from opd_jax.data.store_verify_segment import TOKEN_FIELDS, Findings, check_records, check_segment
from opd_jax.errors import DataError

FREEZE_AGAIN = "delete it and run the stage that wrote the records again: it freezes them"


@dataclass
class Verified:
    """What was found, and how much there was to read.

    Attributes:
        passes: how many records each teacher pass has scores for.
    """

    found: Findings = field(default_factory=Findings)
    records: int = 0
    response_tokens: int = 0
    segments: int = 0
    snapshots: int = 0
    passes: dict[str, int] = field(default_factory=dict[str, int])


def verify_store(files: StoreFiles, on_step: Callable[[str], None] = lambda _: None) -> Verified:
    """Every checksum, count and invariant of every commit, snapshot and teacher pass.

    Args:
        on_step: told what is read next.

    Raises:
        SchemaVersionError: the store says it is of a version that is not known here.
    """
    result = Verified()
    found = result.found
    try:
        files.read_document("dataset.json", "copy it from where the store came from, or make anew")
    except SchemaVersionError:
        raise
    except DataError as error:
        found.problems.append(str(error))
    with found.caught():
        if files.exists("shares.json"):
            files.read_document("shares.json", "delete it once no share is at work")
    layout = look(files)
    readable: list[str] = []
    for name in commit_names(files, ""):
        on_step(f"segment {name}")
        segment = check_segment(files, "", name, TOKEN_FIELDS, found)
        result.segments += 1
        if segment is not None:
            check_records(segment, found)
            result.records += segment.commit["records"]
            if segment.columns is not None:
                readable.append(name)
                result.response_tokens += int(segment.columns["len_response"].sum())
    cache = SegmentCache(files, "")
    rollouts = _loaded(cache, readable)
    _check_duplicates(files, list(rollouts.values()), found)
    frozen = set[str]()
    for name in files.names("snapshots/"):
        on_step(f"snapshot {name[:12]}")
        frozen |= _check_snapshot(files, cache, rollouts, name, found)
        result.snapshots += 1
    for name in layout.passes:
        on_step(f"teacher pass {name}")
        result.passes[name] = check_pass(files, name, rollouts, frozen, found)
    _note_files(files, layout, result)
    return result


def _loaded(cache: SegmentCache, names: list[str]) -> dict[str, Segment]:
    """Segments whose commit and columns are sound; what hinders the others is reported already."""
    loaded: dict[str, Segment] = {}
    for name in names:
        try:
            (loaded[name],) = cache.load([name])
        except DataError:
            continue
    return loaded


def _check_duplicates(files: StoreFiles, segments: list[Segment], found: Findings) -> None:
    twice: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for key, first, second in RecordOrder(segments).duplicates() if segments else ():
        twice.setdefault((first, second), []).append(key)
    for (first, second), keys in sorted(twice.items()):
        prompt_id, sample = keys[0]
        found.add(
            files.path(f"commits/{second}.json"),
            f"{len(keys)} records are in {first} too (first: prompt {prompt_id!r}, sample"
            f" {sample})",
            "delete this commit and run the stage again",
        )


def _check_snapshot(
    files: StoreFiles,
    cache: SegmentCache,
    rollouts: dict[str, Segment],
    name: str,
    found: Findings,
) -> set[str]:
    """Returns the names of its segments, as far as it can be read."""
    key, names = f"snapshots/{name}.json", set[str]()
    with found.caught():
        body = files.read_document(key, FREEZE_AGAIN)
        digests = {entry["name"]: entry["digest"] for entry in body["segments"]}
        names |= digests.keys()
        lost = sorted(names - rollouts.keys())
        other = [n for n in digests if n in rollouts and rollouts[n].digest != digests[n]]
        if other:
            what = f"segment {other[0]} is not the one that was frozen"
            found.add(files.path(key), what, FREEZE_AGAIN)
        elif lost:
            what = f"its segments {', '.join(lost)} are missing or damaged"
            found.add(files.path(key), what, "once they are repaired, " + FREEZE_AGAIN)
        elif (held := len(Snapshot(files, cache, name))) != body["records"]:
            what = f"says {body['records']} records, its segments hold {held}"
            found.add(files.path(key), what, FREEZE_AGAIN)
    return names


def _note_files(files: StoreFiles, layout: StoreLayout, result: Verified) -> None:
    notes = result.found.notes
    for folder in layout.orphans:
        notes.append(
            f"{files.path(folder)}: a segment without a commit, left by a writer that was killed"
            " or is at work; --gc removes it by age"
        )
    for key in layout.unfinished:
        notes.append(f"{files.path(key)}: left by a write that never ended; may be deleted")
    for key in layout.foreign:
        notes.append(f"{files.path(key)}: is no part of the store; nothing here reads it")
    for name, scored in result.passes.items():
        if scored < result.records:
            notes.append(
                f"{files.path(f'teacher/{name}/')}: has scores of {scored} of the"
                f" {result.records} records"
            )
