"""`metrics.jsonl`: one JSON object per line with `stage`, `run`, `step` and figures.

The file is only appended to and flushed line by line, so a kill costs at most a torn last line,
which the next writer takes away. A resumed run drops its own lines from its first step on, and an
evaluation that it makes anew, with its first line: nothing appears twice, and a run that ends
before it has a line leaves those of an earlier one (TensorBoard's are dropped at once).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from opd_jax.core.rng import stable_hash
from opd_jax.errors import ConfigError, DataError, unwritable

FILE_NAME = "metrics.jsonl"
LABELS = ("stage", "run", "step")
EVALUATED = "warnings"  # what a line of an evaluation has, and that of a step has not


class MetricsWriter:
    """Appends the metrics of one run of one stage; of several processes only one may have a writer.

    `start_step` is the first step to be written: lines of this run from there on are dropped, and
    with `again` the evaluation of the step before, which comes anew (to boards it goes once more).
    With `tensorboard`, the same figures go to `RUN_DIR/tensorboard/STAGE/RUN`; with `wandb`, a
    project's name, to Weights & Biases, which keeps its files in `RUN_DIR/wandb`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        stage: str,
        run: str,
        start_step: int = 0,
        tensorboard: bool = False,
        wandb: str | None = None,
        *,
        again: bool = False,
    ) -> None:
        self.stage, self.run = stage, run
        path = Path(run_dir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        read_metrics(run_dir)  # a damaged line is told before any work
        self._drop = functools.partial(_drop_steps, path, stage, run, start_step, again)
        self._path = path
        self._file: TextIO | None = None
        folder = path.parent / "tensorboard" / stage / run
        self._board = _open_board(folder, start_step) if tensorboard else None
        self._wandb = None if wandb is None else _open_wandb(path.parent, wandb, f"{stage}.{run}")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a line. Values are scalars of any kind; one that is not finite is written as null.

        Raises:
            DataError: the disk is full.
        """
        figures = {name: float(value) for name, value in values.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in figures.items()}
        line = {"stage": self.stage, "run": self.run, "step": int(step), **finite}
        try:
            if self._file is None:
                self._drop()
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            path = self._path if self._file is None else self._file.name
            raise unwritable(path, error) from error
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, int(step))
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log({"step": int(step), **figures})

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a line whose write has failed
                self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All lines in file order, null as nan; a torn last line is left out. No file: no lines.

    Raises: DataError on any other line that is not a JSON object with `stage`, `run` and `step`.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.exists():
        return []
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or any(label not in entry for label in LABELS):
        raise DataError(
            f"{path}:{number}: not a metrics line ({line[:40]!r}); delete that line to go on"
        )
    return {name: math.nan if value is None else value for name, value in entry.items()}


def _drop_torn_line(path: Path) -> None:
    """Cut off what a killed writer left after the last line end."""
    if not path.exists():
        return
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)


def _drop_steps(path: Path, stage: str, run: str, start_step: int, again: bool) -> None:
    """Rewrite the file without the lines that `MetricsWriter` drops; in one rename, if any."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    entries = [_parse(path, number, line) for number, line in enumerate(lines, 1)]

    def first_dropped(entry: dict[str, Any]) -> int:
        return start_step - 1 if again and EVALUATED in entry else start_step

    kept = [
        line
        for line, entry in zip(lines, entries, strict=True)
        if (entry["stage"], entry["run"]) != (stage, run) or entry["step"] < first_dropped(entry)
    ]
    if len(kept) < len(lines):
        partial = path.with_suffix(".tmp")
        partial.write_bytes(b"".join(kept))
        partial.replace(path)


def _open_board(folder: Path, start_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tensorboard=true, but tensorboardX is not installed; "
            "pip install tensorboardX, or set tensorboard=false"
        ) from None
    return SummaryWriter(str(folder), purge_step=start_step)


def _open_wandb(run_dir: Path, project: str, name: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"wandb={project}, but the package wandb is not installed; pip install wandb, or leave "
            "the key out"
        ) from None
    key = stable_hash(f"{run_dir.resolve()}/{name}")  # a resumed run goes on in the same curve
    run = wandb.init(
        project=project,
        group=run_dir.name,
        name=name,
        id=f"{key:016x}",
        resume="allow",
        dir=str(run_dir),
    )
    run.define_metric("*", step_metric="step")  # its own counter never goes back, steps may
    return run
