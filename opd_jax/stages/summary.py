"""`summary.json`: the run's figures in one file, gathered from the stage records."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import jax

from opd_jax.stages.context import RunContext
from opd_jax.stages.records import Json, write_json
from opd_jax.teacher.consistency import mismatch_note

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "transformers")


def write_summary(ctx: RunContext, stages: list[str]) -> Json:
    """Gather and write; parts that have not run are absent.

    Args:
        stages: names in pipeline order.
    """
    records = {name: record for name in stages if (record := ctx.records.done(name))}
    summary: Json = {"stages": {name: _cost(record) for name, record in records.items()}}
    summary |= {"eval": {}, "reverse_kl": {}, "reverse_kl_stderr": {}, "lineage": {}}
    for stage, record in records.items():
        kind, _, name = stage.partition(".")
        if kind != "evaluate":
            continue
        outputs = record["outputs"]
        if ctx.checkpoint_identity(name).fingerprint != outputs["model"]["fingerprint"]:
            continue  # the model was trained again since
        if "eval" in outputs:
            summary["eval"][name] = outputs["eval"]
        if "reverse_kl" in outputs:
            summary["reverse_kl"][name] = outputs["reverse_kl"]["mean"]
            summary["reverse_kl_stderr"][name] = outputs["reverse_kl"]["stderr"]
        summary["lineage"][name] = _ancestors(ctx, name, outputs["model"])
    summary["teacher_mismatch"] = _mismatches(ctx, records)
    summary["environment"] = environment()
    write_json(ctx.run_dir / "summary.json", summary)
    return summary


def _mismatches(ctx: RunContext, records: dict[str, Json]) -> dict[str, str]:
    """Every model that was trained although the teachers differ, with the note that marks it."""
    names = [stage.removeprefix("train.") for stage in records if stage.startswith("train.")]
    marked = {name: ctx.lineage(name) for name in names}
    return {
        name: mismatch_note(lineage["student"]["sft_teacher"], lineage)
        for name, lineage in marked.items()
        if lineage.get("teacher_mismatch")
    }


def _cost(record: Json) -> Json:
    cost: Json = {"seconds": record["seconds"], **record["counts"]}
    if "tokens" in cost:
        cost["tokens_per_second"] = round(cost["tokens"] / max(record["seconds"], 1e-9), 1)
    cost["device_hours"] = record["device_seconds"] / 3600
    cost["peak_host_gib"] = record.get("peak_host_gib")
    return cost


def _ancestors(ctx: RunContext, name: str, model: Json) -> Any:
    return {"model": model} if name in ("base", "teacher") else ctx.lineage(name)


def environment() -> Json:
    """Versions and devices."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        **{name: version(name) for name in PACKAGES},
    }
