"""`report.html`: one file that needs no other, readable by light, by dark and on a phone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from opd_jax.report.curves import Panel, draw_run
from opd_jax.report.run_files import RunFiles, read_run
from opd_jax.report.samples import pick_examples
from opd_jax.report.tables import ResultRow, descriptions, result_rows, stage_rows


def build_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder, from what is there, and return its path."""
    run = read_run(run_dir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows, lineage = result_rows(run.summary), run.summary.get("lineage", {})
    examples, picked = pick_examples(run.samples)
    page = environment.get_template("page.html.jinja").render(
        title=run.folder.resolve().name,
        results=rows,
        descriptions=descriptions([row.name for row in rows], lineage),
        highest_kl=max((row.reverse_kl.mean for row in rows if row.reverse_kl), default=0.0),
        kl_change=_kl_changes(rows),
        stages=stage_rows(run.stages),
        scores=run.scores,
        curves=_curves(run),
        examples=examples,
        picked=picked,
        mismatches=run.summary.get("teacher_mismatch", {}),
        lineage=list(_flatten(lineage)),
        environment=list(_flatten(run.summary.get("environment", {}))),
        config_text=run.config_text,
    )
    path = run.folder / "report.html"
    partial = path.with_suffix(".tmp")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _kl_changes(rows: list[ResultRow]) -> dict[str, str]:
    """Reverse KL of what was trained from the SFT student, over that of the SFT student."""
    kl = {row.name: row.reverse_kl.mean for row in rows if row.reverse_kl}
    start = kl.get("sft", 0.0)
    trained = kl.keys() - {"base", "sft", "teacher"}
    return {name: f"{kl[name] / start:.2f} × SFT" for name in trained if start > 0}


def _curves(run: RunFiles) -> list[tuple[str, list[Panel]]]:
    """A heading and panels for every run of every stage, in the order of their first line."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in run.metrics:
        runs.setdefault((entry["stage"], entry["run"]), []).append(entry)
    return [
        (stage if stage == name else f"{stage}: {name}", draw_run(entries, f"{stage}-{name}-"))
        for (stage, name), entries in runs.items()
    ]


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, short text, full text) of every leaf; long digests are shortened."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{key}[{index}]")
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield key, re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b", r"\1…", text), text
