"""What a run folder holds for the report; anything may be missing, nothing may be damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from opd_jax.core.metrics import read_metrics
from opd_jax.errors import DataError

SAMPLES_READ = 200
"""Lines of each samples file that are looked at; a real run has hundreds of thousands."""


@dataclass(frozen=True)
class RunFiles:
    """The parsed files.

    Attributes:
        samples: of each checkpoint, its first graded answers.
        scores: what `teacher.summary` says of the teacher pass; empty where there is none.
    """

    folder: Path
    summary: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    metrics: list[dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    scores: dict[str, Any]
    config_text: str


def read_run(run_dir: str | Path) -> RunFiles:
    """Raises: DataError when the folder is missing or a file in it is not what it should be."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run folder; run a stage first")
    config_file = folder / "config.yaml"
    summary = _read_object(folder / "summary.json")
    stages = {
        path.stem: _read_object(path)
        for path in sorted(folder.glob("stages/*.json"))
        if not path.stem.endswith(".started")
    }
    known = summary.get("stages", {})
    return RunFiles(
        folder=folder,
        summary=summary,
        stages=known | {k: v for k, v in stages.items() if k not in known},
        metrics=read_metrics(folder),
        samples={
            path.parent.name: _read_samples(path)
            for path in sorted(folder.glob("evaluate/*/samples.jsonl"))
        },
        scores=_read_object(folder / "scores.json"),
        config_text=config_file.read_text(encoding="utf-8") if config_file.exists() else "",
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object; run its stage again with --force")
    return value


def _read_samples(path: Path) -> list[dict[str, Any]]:
    samples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(islice(file, SAMPLES_READ), 1):
            try:
                sample = json.loads(line)
            except ValueError:
                sample = None
            if not isinstance(sample, dict) or not {"prompt", "response"} <= sample.keys():
                raise DataError(
                    f"{path}:{number}: not a sample with 'prompt' and 'response'; "
                    "run evaluate again with --force evaluate"
                )
            samples.append(sample)
    return samples
