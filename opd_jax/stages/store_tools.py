"""What the command line does with a store alone: look at it, check it, clean it up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from opd_jax.data.store_gc import DEFAULT_HOURS, Orphan, collect_garbage
from opd_jax.data.store_inspect import StoreFacts, inspect_store
from opd_jax.data.store_layout import open_files
from opd_jax.data.store_verify import Verified, verify_store
from opd_jax.data.tokenizer import Tokenizer, load_tokenizer
from opd_jax.errors import ModelError
from opd_jax.report.store_view import counted, render_store, wide_console

DAMAGED = 3
"""Exit code of `verify` where anything is wrong."""


def inspect(root: str, tokenizer: str | None) -> int:
    """Show what a store holds."""
    facts = inspect_store(open_files(root))
    found, note = _tokenizer(facts, tokenizer)
    decode = None if found is None else lambda ids: found.decode(ids, skip_special=False)
    wide_console().print(render_store(facts, decode, note))
    return 0


def _tokenizer(facts: StoreFacts, given: str | None) -> tuple[Tokenizer | None, str]:
    """The one that was given, or one that the lineage names and that is the generator's."""
    fingerprint = _model(facts.meta.get("generator")).get("tokenizer")
    if given is not None:
        found = load_tokenizer(given, chats=False)
        differs = fingerprint is not None and found.fingerprint != fingerprint
        note = "this is not the generator's tokenizer: the text may be wrong"
        return found, note if differs else ""
    for path in _candidates(facts):
        try:
            found = load_tokenizer(path, chats=False)
        except ModelError:
            continue
        if found.fingerprint == fingerprint:
            return found, ""
    return None, "the generator's tokenizer is not here: --tokenizer PATH (a model) shows text"


def _model(value: Any) -> dict[str, str]:
    return value if isinstance(value, dict) else {}


def _candidates(facts: StoreFacts) -> Iterator[Path]:
    """Models that are named in the lineage or in the run's config, where they exist."""
    named = [facts.meta.get("generator"), facts.meta.get("sft_teacher")]
    named += [scores.meta.get("teacher") for scores in facts.passes]
    names = [_model(model).get("name", "") for model in named]
    config = Path(facts.root).parent / "config.yaml"
    if config.is_file():
        model = _model(yaml.safe_load(config.read_text(encoding="utf-8"))).get("model")
        names += [str(_model(model).get(role, "")) for role in ("student", "teacher")]
    yield from (Path(name) for name in dict.fromkeys(names) if name and Path(name).exists())


def verify(root: str) -> int:
    """Name everything that is wrong with a store."""
    console = Console(highlight=False, soft_wrap=True)
    with console.status("reading") as status:
        result = verify_store(open_files(root), lambda step: status.update(f"reading {step}"))
    for problem in result.found.problems:
        console.print(_line("damaged  ", "red", " ".join(problem.split())))
    for note in result.found.notes:
        console.print(_line("note     ", "yellow", note))
    console.print(_verdict(result))
    return DAMAGED if result.found.problems else 0


def _line(word: str, style: str, text: str) -> Text:
    return Text.assemble((word, style), text)


def _verdict(result: Verified) -> Text:
    problems = len(result.found.problems)
    read = ", ".join(
        counted(number, what)
        for number, what in (
            (result.records, "record"),
            (result.response_tokens, "response token"),
            (result.segments, "segment"),
            (result.snapshots, "snapshot"),
        )
    )
    passes = len(result.passes)
    read += f", {passes} teacher pass{'' if passes == 1 else 'es'}"
    if problems:
        return _line("damaged  ", "bold red", f"{counted(problems, 'problem')} in {read}")
    return _line("sound    ", "bold green", read)


def gc(root: str, older_than_hours: float | None, dry_run: bool) -> int:
    """Remove what killed writers left behind."""
    hours = DEFAULT_HOURS if older_than_hours is None else older_than_hours
    console = Console(highlight=False, soft_wrap=True)
    files = open_files(root)
    result = collect_garbage(files, hours, dry_run)
    word = "would remove  " if dry_run else "removed  "
    for orphan in result.removed:
        console.print(_line(word, "red", f"{files.path(orphan.folder)}  {_told(orphan)}"))
    for orphan in result.kept:
        console.print(_line("kept  ", "yellow", f"{files.path(orphan.folder)}  {_told(orphan)}"))
    size = sum(orphan.size or 0 for orphan in result.removed)
    count = counted(len(result.removed), "segment folder")
    young = f"; {len(result.kept)} kept: younger than {hours:g} hours"
    amount = "" if None in [o.size for o in result.removed] else f", {size:,} bytes"
    console.print(f"{word.strip()} {count} without a commit{amount}{young if result.kept else ''}")
    return 0


def _told(orphan: Orphan) -> str:
    size = "size unknown" if orphan.size is None else f"{orphan.size:,} bytes"
    age = "age unknown" if orphan.hours is None else f"last written {orphan.hours:,.1f} hours ago"
    return f"{size}, {age}"
