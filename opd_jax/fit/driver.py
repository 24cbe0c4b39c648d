"""`--fit TARGET`: compile a config's programs in a process of its own, print and keep the result."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax.config import Config
from opd_jax.core.progress import say
from opd_jax.errors import ConfigError, OPDError
from opd_jax.fit.results import FitReport
from opd_jax.fit.show import print_report
from opd_jax.fit.targets import AUTO, parse_target
from opd_jax.fit.topology import environment
from opd_jax.fit.worker import ANSWER, MARK, REQUEST

FILE = "fit.json"


def run(config: Config, target: str, stages: Sequence[str] | None) -> int:
    """Judge a config on a target, or on each of `auto` until it fits; 0 if it fits, 3 if not.

    Raises:
        OPDError: the target, the config or a model is wrong, or a compiler crashed.
    """
    targets = AUTO if target.strip() == "auto" else (target,)
    for name in targets:
        parse_target(name)
    report = None
    for name in targets:
        report = judge(config, name, stages)
        if report is not None:
            print_report(report)
            _keep(config, report)
            if report.fits:
                return 0
    if report is None:
        raise ConfigError(f"fit: the config's mesh and batches suit none of {', '.join(targets)}")
    return 3


def judge(config: Config, target: str, stages: Sequence[str] | None) -> FitReport:
    """What the compilers make of a config's programs."""
    with tempfile.TemporaryDirectory(prefix="opd_jax-fit-") as folder:
        request = {"config": config.model_dump(mode="json"), "target": target, "stages": stages}
        Path(folder, REQUEST).write_text(json.dumps(request), encoding="utf-8")
        answer = _answer(folder, target)
    if "error" in answer:
        raise ConfigError(answer["error"])
    return FitReport.from_json(answer)


def _answer(folder: str, target: str) -> dict[str, Any]:
    """Start the worker, pass on what it says, and read what it leaves."""
    command = [sys.executable, "-m", "opd_jax.fit.worker", folder]
    with Path(folder, "stderr").open("w+", encoding="utf-8", errors="replace") as errors:
        worker = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith(MARK):
                    say(f"{target}: {line.removeprefix(MARK).rstrip()}")
            code = worker.wait()
        finally:
            worker.kill()
        errors.seek(0)
        told = [line.strip() for line in errors if line.strip()]
    path = Path(folder, ANSWER)
    if not path.is_file():
        last = told[-1][:400] if told else "it said nothing"
        raise OPDError(f"fit: compiling for '{target}' ended with code {code}: {last}")
    return json.loads(path.read_text(encoding="utf-8"))


def _keep(config: Config, report: FitReport) -> None:
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    say(f"written to {path}")
