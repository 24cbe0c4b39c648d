"""What is known of a stage on disk: what it was started with, what it cost, how it ended.

`stages/NAME.json` is written last. `stages/NAME.started.json` holds the inputs of a stage that is
under way and what it took so far, earlier, interrupted tries included. `.forced.json` in the run
folder is there while a command with `--force` is not done: which stages it redoes, and with which
inputs it has begun to. Given again, it goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opd_jax.core.distributed import await_seen, from_first, is_first
from opd_jax.data.store_files import StoreFiles
from opd_jax.errors import DataError, StageError, unwritable

Json = dict[str, Any]
Artefact = Path | StoreFiles
"""What a stage leaves behind: a folder here, or one on an object store."""


def exists(artefact: Artefact) -> bool:
    """Whether a stage has left anything there."""
    return artefact.exists() if isinstance(artefact, Path) else not artefact.is_empty()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one rename; process 0 alone does.

    Raises:
        DataError: the disk is full, or the folder not ours.
    """
    if not is_first():
        return
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise unwritable(path, error) from error


def read_json(path: Path) -> Json | None:
    """A JSON file, `None` where there is none.

    Raises:
        DataError: it is there but cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error}); delete it to redo that stage") from error


class Spent(NamedTuple):
    """What a stage took, all tries together: each may have had another number of devices."""

    seconds: float = 0.0
    device_seconds: float = 0.0

    def more(self, seconds: float, devices: int) -> Spent:
        """With so many seconds of so many devices added."""
        return Spent(self.seconds + seconds, self.device_seconds + seconds * devices)

    @staticmethod
    def of(record: Json) -> Spent:
        """What a stage's record says, complete or under way."""
        return Spent(record["seconds"], record["device_seconds"])

    def to_json(self) -> Json:
        return {name: round(value, 3) for name, value in self._asdict().items()}


class StageRecords:
    """The `stages/` folder of a run."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "stages"

    def _final(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _started(self, name: str) -> Path:
        return self.folder / f"{name}.started.json"

    def done(self, name: str) -> Json | None:
        """The record of a completed stage."""
        return read_json(self._final(name))

    def done_everywhere(self, name: str, *, here: bool) -> Json | None:
        """`done`, if what it wrote is `here` too, as process 0 finds it. All processes call it."""
        record = self.done(name) if here else None
        if from_first("done" if record is not None else "open") == "open":
            return None
        await_seen(lambda: self.done(name) is not None, str(self._final(name)))
        return self.done(name)

    def started(self, name: str) -> Json | None:
        """What a stage under way was started with."""
        return read_json(self._started(name))

    def outputs(self, name: str, needed_by: str) -> Json:
        """The outputs of a completed stage.

        Raises:
            StageError: it is not complete.
        """
        if not is_first() and self.done(name) is None:  # or process 0 ends this one
            await_seen(lambda: self.done(name) is not None, str(self._final(name)))
        record = self.done(name)
        if record is None:
            raise StageError(
                f"stage '{needed_by}' needs stage '{name}', which is not complete; run it first "
                f"(leave out --stages, or add {name.split('.', maxsplit=1)[0]} to it)"
            )
        return record["outputs"]

    def check_inputs(self, name: str, inputs: Json) -> None:
        """Raises StageError if the stage, complete or under way, was started with other inputs."""
        record = self.done(name) or self.started(name)
        if record is None:
            return
        changed = [
            f"{key} changed from {old} to {new}" for key, old, new in self.changes(record, inputs)
        ]
        if changed:
            raise StageError(
                f"stage '{name}': {'; '.join(changed)} since it ran; --force {name} redoes it, "
                "another run_dir keeps it"
            )

    @staticmethod
    def changes(record: Json, inputs: Json) -> list[tuple[str, str, str]]:
        """(dotted key, old value, new value) wherever a record's inputs and these differ."""
        return _differences(record["inputs"], json.loads(json.dumps(inputs)))

    def start(self, name: str, inputs: Json) -> Spent:
        """Note the inputs of a stage that begins; returns what earlier tries took."""
        earlier = self.started(name)
        spent = Spent() if earlier is None else Spent.of(earlier)
        self.tick(name, inputs, spent)
        return spent

    def drop_started(self, name: str) -> None:
        """Forget that a stage, or shares of it, was under way."""
        if is_first():
            for path in [self._started(name), *self._shares(name)]:
                path.unlink(missing_ok=True)

    def _shares(self, name: str) -> list[Path]:
        return list(self.folder.glob(f"{name}.share-*.started.json"))

    def shares_spent(self, name: str) -> list[Spent]:
        """What each share of a stage took, as far as this run folder knows."""
        found = [read_json(path) for path in self._shares(name)]
        return [Spent.of(record) for record in found if record is not None]

    def tick(self, name: str, inputs: Json, spent: Spent) -> None:
        """Note what the stage has taken so far."""
        write_json(self._started(name), {"inputs": inputs, **spent.to_json()})

    def finish(self, name: str, record: Json) -> None:
        """Mark the stage complete."""
        write_json(self._final(name), record)
        self.drop_started(name)

    def redo(self, names: Sequence[str]) -> None:
        """Note which stages a command redoes, unless it is the one that is under way."""
        if is_first() and names and self._begun(names) is None:
            write_json(self._forced, {"stages": list(names), "begun": {}})

    def is_redone(self, name: str, inputs: Json, names: Sequence[str]) -> bool:
        """Whether the command that redoes these stages has begun this one, with these inputs.

        Process 0 looks, which alone puts things aside.
        """
        begun = (self._begun(names) or {}).get(name) if is_first() else None
        return begun is not None and begun == json.loads(json.dumps(inputs))

    def all_redone(self, names: Sequence[str]) -> None:
        """Forget the command that redoes these stages: it is done."""
        if is_first() and self._begun(names) is not None:
            self._forced.unlink(missing_ok=True)

    def forget_begun(self, name: str) -> None:
        """The next command with `--force` redoes the stage, also the one that has begun to."""
        if is_first():
            with contextlib.suppress(DataError):  # of what this one is told about
                self._note_begun(name, None)

    @property
    def _forced(self) -> Path:
        return self.folder.parent / ".forced.json"

    def _begun(self, names: Sequence[str]) -> Json | None:
        """Inputs of what an unfinished command with these stages has begun; `None`: no such one."""
        known = read_json(self._forced)
        return known["begun"] if known is not None and known["stages"] == list(names) else None

    def _note_begun(self, name: str, inputs: Json | None) -> None:
        if (known := read_json(self._forced)) is not None:
            known["begun"].pop(name, None)
            write_json(
                self._forced,
                known if inputs is None else known | {"begun": known["begun"] | {name: inputs}},
            )

    def set_aside(self, name: str, artefacts: Sequence[Artefact], inputs: Json) -> None:
        """Put away what a stage wrote, and then its record, until the stage is complete again.

        What is put away already is what was complete, and an unfinished try after it is removed;
        unless that has its record, when only the removal of the older one was cut short. An object
        store cannot rename: what lies there is removed, after the stage's record.
        """
        if not is_first():
            return
        complete = self._final(name).exists()
        stores = [artefact for artefact in artefacts if isinstance(artefact, StoreFiles)]
        if stores:
            self._final(name).unlink(missing_ok=True)
            _remove(_aside(self._final(name)))
        for store in stores:
            store.remove()
        for path in self._local(name, artefacts):
            if path.exists() and _aside(path).exists() and not complete:
                _remove(path)
            elif path.exists():
                _remove(_aside(path))
                path.rename(_aside(path))
        self.drop_started(name)
        self._note_begun(name, inputs)

    def _local(self, name: str, artefacts: Sequence[Artefact]) -> list[Path]:
        """A stage's folders on this machine, and its record."""
        return [*(path for path in artefacts if isinstance(path, Path)), self._final(name)]

    def put_back(self, name: str, artefacts: Sequence[Artefact]) -> None:
        """Undo `set_aside`, unless something new has been written since.

        A store or a pass without a commit holds nothing: it gives way.
        """
        if not is_first() or any(exists(a) and not _is_bare(a) for a in artefacts):
            return
        self.forget_begun(name)
        for path in self._local(name, artefacts):
            if _aside(path).exists():
                _remove(path)
                _aside(path).rename(path)
                self._started(name).unlink(missing_ok=True)

    def drop_aside(self, name: str, artefacts: Sequence[Artefact]) -> None:
        """Remove what `set_aside` put away."""
        if is_first():
            for path in self._local(name, artefacts):
                _remove(_aside(path))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _is_bare(artefact: Artefact) -> bool:
    """Whether it is a store's or a pass's folder in which nothing is committed."""
    if not isinstance(artefact, Path):
        return False
    begun = any((artefact / name).is_file() for name in ("dataset.json", "pass.json"))
    return begun and not any(artefact.glob("commits/*.json"))


def _remove(path: Path) -> None:
    """A folder or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _differences(old: Any, new: Any, at: str = "") -> list[tuple[str, str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[tuple[str, str, str]] = []
        for key in sorted({*old, *new}):
            where = f"{at}.{key}" if at else key
            found += _differences(old.get(key), new.get(key), where)
        return found
    return [] if old == new else [(at, _short(old), _short(new))]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
