"""Everything that can be wrong with a teacher pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from opd_jax.data.store_files import StoreFiles
from opd_jax.data.store_segments import Segment, commit_names
from opd_jax.data.store_verify_segment import CheckedSegment, Findings, check_segment, rows_where
from opd_jax.errors import DataError

HALF_STEP = 2.0**-10
"""Relative distance of two neighbouring float16 values, in which the top-k is stored."""


def check_pass(
    files: StoreFiles,
    name: str,
    rollouts: Mapping[str, Segment],
    frozen: set[str],
    found: Findings,
) -> int:
    """Segments of one pass, by themselves and against the records they score.

    Args:
        rollouts: the store's segments that could be loaded.
        frozen: names of the segments of all snapshots.

    Returns:
        How many records have scores.
    """
    base = f"teacher/{name}/"
    meta: dict[str, Any] = {}
    with found.caught():
        repair = "delete that folder and run the score stage again"
        meta = files.read_document(f"{base}pass.json", repair)["meta"]
    with found.caught():
        if files.exists(f"{base}shares.json"):
            files.read_document(f"{base}shares.json", "delete it once no share is at work")
    committed = set(commit_names(files, ""))
    scored: dict[tuple[str, int], str] = {}
    for segment_name in commit_names(files, base):
        segment = check_segment(files, base, segment_name, ["logprob"], found)
        if segment is None:
            continue
        places = _places(segment, rollouts, committed, frozen, found)
        _check_repeated(segment, places, scored, found)
        _check_scores(segment, places, rollouts, meta.get("top_k"), found)
    return len(scored)


def _places(
    segment: CheckedSegment,
    rollouts: Mapping[str, Segment],
    committed: set[str],
    frozen: set[str],
    found: Findings,
) -> list[tuple[str, int] | None]:
    """(segment, row in it) that each row scores; `None` where that cannot be told."""
    sources = segment.commit["scored_segments"]
    usable: list[bool] = []
    for name, digest in sources:
        rollout = rollouts.get(name)
        usable.append(rollout is not None and rollout.digest == digest)
        if name not in committed | frozen:
            found.notes.append(
                f"{segment.path}: has scores of segment {name}, whose records were sampled again;"
                " nothing reads them"
            )
        elif name not in committed:
            what = f"scores segment {name}, which has no commit"
            found.add(segment.path, what, segment.repair)
        elif rollout is not None and rollout.digest != digest:
            what = f"scored another segment {name} than is there now"
            found.add(segment.path, what, segment.repair)
    columns = segment.columns
    if columns is None:
        return []
    rows = columns["source"], columns["source_row"], columns["len_response"]
    places: list[tuple[str, int] | None] = []
    outside, unequal = [], []
    for number, (source, row, length) in enumerate(zip(*(r.tolist() for r in rows), strict=True)):
        place = None
        if not 0 <= source < len(sources):
            outside.append(number)
        elif usable[source]:
            rollout = rollouts[sources[source][0]]
            if not 0 <= row < len(rollout):
                outside.append(number)
            elif rollout.columns["len_response"][row] != length:
                unequal.append(number)
            else:
                place = (rollout.name, row)
        places.append(place)
    where = f"{segment.path}/records.npz"
    segment.report(found, outside, "score a record that does not exist", where)
    segment.report(found, unequal, "have not one score per response token", where)
    return places


def _check_repeated(
    segment: CheckedSegment,
    places: list[tuple[str, int] | None],
    scored: dict[tuple[str, int], str],
    found: Findings,
) -> None:
    twice = [n for n, place in enumerate(places) if place is not None and place in scored]
    if twice:
        others = sorted({scored[place] for n in twice if (place := places[n]) is not None})
        segment.report(found, twice, f"have scores in {', '.join(others)} already")
    scored |= {place: segment.name for place in places if place is not None}


def _check_scores(
    segment: CheckedSegment,
    places: list[tuple[str, int] | None],
    rollouts: Mapping[str, Segment],
    top_k: int | None,
    found: Findings,
) -> None:
    """Values of the scores, and of the top-k against them."""
    logprob = segment.rows.get("logprob")
    if logprob is None:
        return
    bad = rows_where(logprob, lambda x: ~(np.isfinite(x) & (x <= 0)))
    where = f"{segment.path}/logprob"
    segment.report(found, bad, "have scores that are not finite or above 0", where)
    _check_masses(segment, found)
    ids, top = segment.rows.get("topk_ids"), segment.rows.get("topk_logprob")
    widths = {row.shape[1] for rows in (ids, top) for row in rows or () if row is not None}
    if (top_k is not None and widths - {top_k}) or (top_k and not widths and logprob):
        what = f"stores {sorted(widths) or 'no'} tokens per position, its pass has top_k {top_k}"
        found.add(segment.path, what, segment.repair)
    if ids is None or top is None:
        return
    where = f"{segment.path}/topk_ids"
    bad = rows_where(
        ids, lambda x: (np.diff(np.sort(x, axis=-1), axis=-1) == 0).any(-1) | (x < 0).any(-1)
    )
    segment.report(found, bad, "have a top-k id twice at one position, or a negative one", where)
    where = f"{segment.path}/topk_logprob"
    bad = rows_where(top, lambda x: ~np.isfinite(x) | (x > 0))
    segment.report(found, bad, "have top-k log-probs that are not finite or above 0", where)
    bad = rows_where(top, lambda x: np.diff(x.astype(np.float32), axis=-1) > 0)
    segment.report(found, bad, "have top-k log-probs that are not sorted, likeliest first", where)
    bad = rows_where(top, lambda x: np.exp(x.astype(np.float64)).sum(-1) > 1 + 4 * HALF_STEP)
    segment.report(found, bad, "have top-k probabilities that add up to more than 1", where)
    _check_rest(segment, top, found)
    sampled = _sampled_tokens(places, rollouts)
    bad = [
        row
        for row, (token, *scores) in enumerate(zip(sampled, logprob, ids, top, strict=True))
        if token is not None and all(s is not None for s in scores) and _contradicts(token, *scores)  # type: ignore[arg-type]
    ]
    segment.report(found, bad, "have a top-k that contradicts the sampled token's score", where)


def _check_masses(segment: CheckedSegment, found: Findings) -> None:
    """Entropy and the mass outside the top-k, where they are kept."""
    for field, highest in (("entropy", np.inf), ("topk_rest", 1.0)):
        rows = segment.rows.get(field)
        if rows is not None:
            bad = rows_where(rows, lambda x: ~np.isfinite(x) | (x < -1e-4) | (x > highest))  # noqa: B023
            what = f"have a {field} that is not finite, below 0 or above {highest:g}"
            segment.report(found, bad, what, f"{segment.path}/{field}")


def _check_rest(segment: CheckedSegment, top: list[np.ndarray | None], found: Findings) -> None:
    """The top-k and the mass of all others are everything there is."""
    rest = segment.rows.get("topk_rest")
    if rest is None:
        return
    both = zip(top, rest, strict=True)
    bad = [
        row for row, (x, y) in enumerate(both) if x is not None and y is not None and _open(x, y)
    ]
    what = "have a top-k and a mass of all others that do not add up to 1"
    segment.report(found, bad, what, f"{segment.path}/topk_rest")


def _open(top: np.ndarray, rest: np.ndarray) -> bool:
    inside = np.exp(top.astype(np.float64))
    slack = HALF_STEP * (1 + np.sum(inside * np.abs(top.astype(np.float64)), axis=-1))
    return bool(np.any(np.abs(inside.sum(-1) + rest - 1) > slack + 1e-3))


def _sampled_tokens(
    places: list[tuple[str, int] | None], rollouts: Mapping[str, Segment]
) -> list[np.ndarray | None]:
    """The response ids of each place; `None` where they cannot be read."""
    found: list[np.ndarray | None] = [None] * len(places)
    groups: dict[str, list[tuple[int, int]]] = {}
    for number, place in enumerate(places):
        if place is not None:
            groups.setdefault(place[0], []).append((number, place[1]))
    for name, members in groups.items():
        rows = np.array([row for _, row in members], np.int64)
        try:
            tokens = rollouts[name].start_rows("response_ids", rows)()
        except DataError:
            continue  # named where the rollouts were checked
        for (number, _), value in zip(members, tokens, strict=True):
            found[number] = value
    return found


def _contradicts(
    sampled_t: np.ndarray, logprob_t: np.ndarray, ids_tk: np.ndarray, top_tk: np.ndarray
) -> bool:
    """Whether a sampled token has another log-prob in the top-k, or is too likely to be outside."""
    top = top_tk.astype(np.float32)
    slack = HALF_STEP * np.abs(top) + 1e-3
    within = ids_tk == sampled_t[:, None]
    differs = within & (np.abs(top - logprob_t[:, None]) > slack)
    outside = ~within.any(-1) & (logprob_t > top[:, -1] + slack[:, -1])
    return bool(differs.any() or outside.any())
