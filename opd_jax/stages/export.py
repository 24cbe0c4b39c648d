"""`export.NAME`: a trained student as a Hugging Face folder with its lineage."""

from __future__ import annotations

import json
from pathlib import Path

from opd_jax.core.distributed import barrier
from opd_jax.model.hf_export import export_folder
from opd_jax.stages.common import Outcome
from opd_jax.stages.context import RunContext
from opd_jax.stages.records import Json
from opd_jax.teacher.consistency import mismatch_note


def _folder(ctx: RunContext, name: str) -> Path:
    return ctx.run_dir / "export" / name


def inputs(ctx: RunContext, name: str) -> Json:
    """The model to export."""
    ctx.records.outputs(f"train.{name}", f"export.{name}")
    return {"model": ctx.checkpoint_identity(name).fingerprint}


def artefacts(ctx: RunContext, name: str) -> list[Path]:
    """What `--force` removes."""
    return [_folder(ctx, name)]


def run(ctx: RunContext, name: str) -> Outcome:
    """Write the folder."""
    model, params = ctx.trained(name)
    folder = _folder(ctx, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lineage = json.dumps(ctx.lineage(name), indent=1) + "\n"
    documents = {"README.md": _card(ctx, name), "lineage.json": lineage}
    export_folder(folder, model, params, ctx.tokenizer("student"), documents, {})
    barrier("exported")
    mismatch = ctx.lineage(name).get("teacher_mismatch", False)
    return Outcome({"folder": str(folder), "teacher_mismatch": mismatch}, {})


def _card(ctx: RunContext, name: str) -> str:
    """The model card: what was trained from what, by which teacher."""
    lineage = ctx.lineage(name)
    student = lineage["student"]
    rows = [
        ("base model", f"{student['base']['name']} (`{student['base']['fingerprint'][:12]}`)"),
        ("wrote the SFT answers", _named(student["sft_teacher"])),
        *_scorer(lineage),
        ("algorithm", f"{lineage['algorithm']}, objective {lineage['objective']}"),
        ("this model", f"`{lineage['model']['fingerprint'][:12]}`"),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    warning = (
        f"\n**Teacher mismatch:** {mismatch_note(student['sft_teacher'], lineage)}.\n"
        if lineage.get("teacher_mismatch", False)
        else ""
    )
    what = {
        "lightning_opd": "A student distilled offline on its own samples (Lightning OPD, arXiv "
        "2604.13010)",
        "opd": "A student distilled on fresh samples of its own with a live teacher (on-policy "
        "distillation)",
        "sft": "A student fine-tuned for longer on its teacher's answers (a control)",
    }[lineage["algorithm"]]
    return (
        f"---\nlibrary_name: transformers\ntags: [on-policy-distillation]\n---\n\n# {name}\n\n"
        f"{what} with opd_jax.\n{warning}\n| | |\n|---|---|\n{table}\n"
    )


def _scorer(lineage: Json) -> list[tuple[str, str]]:
    """The control was scored by nobody."""
    if lineage["algorithm"] == "sft":
        return []
    return [("scored the rollouts", _named(lineage["teacher"]))]


def _named(identity: Json) -> str:
    return f"{identity['name']} (`{identity['fingerprint'][:12]}`)"
