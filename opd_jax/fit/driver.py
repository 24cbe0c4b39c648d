"""`--fit TARGET`: compile a config's programs in another process; print and keep the result."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax.config import Config
from opd_jax.errors import ConfigError, MeshError, OPDError
from opd_jax.fit.results import FitReport
from opd_jax.fit.show import print_report, tell
from opd_jax.fit.targets import candidates, parse_target
from opd_jax.fit.topology import environment
from opd_jax.fit.worker import ANSWER, MARK, REQUEST

FILE = "fit.json"


def run(config: Config, target: str, stages: Sequence[str] | None) -> int:
    """Judge a config on a target, or on the targets of `auto` until it fits; 0: fits, 3: does not.

    Raises:
        OPDError: the target, the config or a model is wrong, or a compiler crashed.
    """
    if not re.match(r"\s*auto\b", target):
        return _show(config, judge(config, parse_target(target).name, stages))
    refused: MeshError | None = None
    code = None
    for name in candidates(target):
        try:
            report = judge(config, name, stages, auto=True)
        except MeshError as error:  # its mesh or its batches are for other numbers of devices
            tell(f"{name}: {error}")
            refused = error
            continue
        if (code := _show(config, report)) == 0:
            break
    if code is None:
        assert refused is not None
        raise refused
    return code


def _show(config: Config, report: FitReport) -> int:
    print_report(report)
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    tell(f"written to {path}")
    return 0 if report.fits else 3


def judge(
    config: Config, target: str, stages: Sequence[str] | None, *, auto: bool = False
) -> FitReport:
    """What the compilers make of a config's programs.

    Args:
        auto: of a config that names no mesh, the best of several; stop at the first program that
            does not fit.

    Raises:
        MeshError: the config is for other numbers of devices.
        ConfigError: anything else is wrong with it, with its models or with the target.
        OPDError: a compiler crashed.
    """
    request = {
        "config": config.model_dump(mode="json"),
        "target": target,
        "stages": stages,
        "auto": auto,
    }
    with tempfile.TemporaryDirectory(prefix="opd_jax-fit-") as folder:
        Path(folder, REQUEST).write_text(json.dumps(request), encoding="utf-8")
        answer = _answer(folder, target)
    if "error" in answer:
        raise (MeshError if answer["mesh"] else ConfigError)(answer["error"])
    return FitReport.from_json(answer)


def _answer(folder: str, target: str) -> dict[str, Any]:
    """Start the worker, pass on what it says, and read what it leaves."""
    command = [sys.executable, "-m", "opd_jax.fit.worker", folder]
    with Path(folder, "stderr").open("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as worker:
            try:
                for line in worker.stdout or ():
                    if line.startswith(MARK):
                        tell(f"{target}: {line.removeprefix(MARK).rstrip()}")
            except BaseException:
                worker.kill()
                raise
        code = worker.returncode
        errors.seek(0)
        told = [line.strip() for line in errors if line.strip()]
    path = Path(folder, ANSWER)
    if not path.is_file():
        raised = [line for line in told if re.match(r"[\w.]+(Error|Exception)\b", line)]
        last = [*told, *raised][-1][:400] if told else "it said nothing"
        raise OPDError(f"fit: compiling for '{target}' ended with code {code}: {last}")
    return json.loads(path.read_text(encoding="utf-8"))
