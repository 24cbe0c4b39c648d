"""A store on the terminal: figures, lineage, a few records with their log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from opd_jax.core.lineage import shown
from opd_jax.data.store_inspect import Example, PassFacts, StoreFacts

BINS = 10
BAR = 40
TOKENS = 12
TEXT = 400
Decode = Callable[[Sequence[int]], str]


def render_store(facts: StoreFacts, decode: Decode | None, note: str = "") -> RenderableType:
    """All sections, in the order of a reader's questions.

    Args:
        decode: token ids to text; `None` shows the ids.
        note: why there is no text, or what to know of it.
    """
    return Group(*_sections(facts, decode, note))


def _sections(facts: StoreFacts, decode: Decode | None, note: str) -> Iterator[RenderableType]:
    yield Text(facts.root, style="bold")
    yield _indented(_grid(_overview(facts)))
    yield _head("response length, tokens")
    yield _indented(_histogram(facts.response_r))
    yield _head("lineage")
    yield _indented(_grid([(key, _value(value)) for key, value in facts.meta.items()]))
    yield _head("teacher passes")
    if not facts.passes:
        yield _indented(Text("none"))
    for scores in facts.passes:
        yield _indented(_grid(_pass_rows(scores, facts)))
    yield _head("on disk")
    yield _indented(_disk(facts))
    yield _head("records")
    if note:
        yield _indented(Text(note, style="yellow"))
    for example in facts.examples:
        yield _indented(_record(example, decode))


def _head(title: str) -> Text:
    return Text(f"\n{title}", style="bold")


def _indented(part: RenderableType) -> Padding:
    return Padding(part, (0, 0, 0, 2), expand=False)


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(value))
    return grid


def _overview(facts: StoreFacts) -> list[tuple[str, str]]:
    records, tokens = len(facts.response_r), int(facts.response_r.sum())
    rows = [
        ("records", f"{records:,}, of {counted(facts.prompts, 'prompt')},"
                    f" in {counted(facts.segments, 'segment')}"),
        ("prompt tokens", f"{int(facts.prompt_r.sum()):,}"),
        ("response tokens", f"{tokens:,}"),
        ("truncated", f"{facts.truncated:.1%} (finish reason length)"),
        ("student log-prob", f"{facts.student_mean:.4f} nats per token"
                             f"{_of_sample(facts.sampled, records)}"),
    ]  # fmt: skip
    graded = facts.rewards[~np.isnan(facts.rewards)]
    if graded.size:
        rows.append(("reward", f"{graded.mean():.3f} on average, {graded.size:,} graded"))
    return [*rows, ("snapshots", _snapshots(facts))]


def counted(number: int, what: str) -> str:
    """`1 record`, `2,000 records`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _of_sample(sampled: int, records: int) -> str:
    return "" if sampled == records else f", of {sampled:,} records"


def _snapshots(facts: StoreFacts) -> str:
    frozen = [f"{name[:12]} ({counted(n, 'record')})" for name, n in facts.snapshots.items()]
    if facts.content_hash in facts.snapshots:
        return ", ".join(frozen)
    return "; ".join([*frozen, "not all that is committed is frozen yet"])


def _histogram(lengths: np.ndarray) -> RenderableType:
    quantiles = [lengths.min(), np.median(lengths), np.percentile(lengths, 95), lengths.max()]
    names = ("min", "median", "p95", "max")
    line = "  ".join(f"{name} {q:,.0f}" for name, q in zip(names, quantiles, strict=True))
    low, width = int(lengths.min()), max(1, -(-(int(np.ptp(lengths)) + 1) // BINS))
    counts = np.bincount((lengths - low) // width)
    bars = Table.grid(padding=(0, 2))
    bars.add_column(justify="right", no_wrap=True)
    bars.add_column(no_wrap=True)
    bars.add_column(justify="right", no_wrap=True)
    for number, count in enumerate(counts.tolist()):
        first = low + number * width
        edges = f"{first:,}" if width == 1 else f"{first:,} to {first + width - 1:,}"
        bar = "█" * round(BAR * count / counts.max()) or ("▏" if count else "")
        bars.add_row(edges, Text(f"{bar:<{BAR}}", style="cyan"), f"{count:,}")
    return Group(bars, Text(line))


def _value(value: Any) -> str:
    """A value of a lineage: models by name and fingerprint, settings one by one."""
    if isinstance(value, dict) and "fingerprint" not in value:
        return ", ".join(f"{key} {_value(part)}" for key, part in value.items())
    if isinstance(value, str):
        return value[:12] if len(value) == 64 else value
    return shown(value) if isinstance(value, dict) else repr(value)


def _pass_rows(scores: PassFacts, facts: StoreFacts) -> list[tuple[str, str]]:
    rows = [("pass", scores.name)]
    rows += [(key, _value(value)) for key, value in scores.meta.items()]
    parts = [f"{done:,} of {total:,} in {h[:12]}" for h, (done, total) in scores.coverage.items()]
    rows.append(("scored", "; ".join(parts) or f"{scores.scored:,} records, none of them frozen"))
    if scores.scored:
        sample = _of_sample(scores.sampled, scores.scored)
        rows += [
            ("teacher log-prob", f"{scores.teacher_mean:.4f} nats per token{sample}"),
            ("student log-prob", f"{scores.student_mean:.4f} of the same tokens"),
            ("difference", f"{scores.student_mean - scores.teacher_mean:.4f}: the reverse KL per"
                           " token, if they were sampled at temperature 1"),
        ]  # fmt: skip
    return rows


def _disk(facts: StoreFacts) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", no_wrap=True)
    for title in ("bytes", "per token"):
        table.add_column(title, justify="right", no_wrap=True)
    responses = int(facts.response_r.sum())
    scored = {f"teacher/{p.name}/": p for p in facts.passes}
    total: int | None = 0
    for kind, size in sorted(facts.layout.kinds().items(), key=lambda item: -(item[1] or 0)):
        tokens = int(facts.prompt_r.sum()) if kind == "prompt_ids" else responses
        owner = next((p for base, p in scored.items() if kind.startswith(base)), None)
        if owner is not None and owner.scored != len(facts.response_r):
            tokens = round(responses * owner.scored / len(facts.response_r))
        table.add_row(kind, *_size(size, tokens))
        total = None if total is None or size is None else total + size
    table.add_section()
    table.add_row("all", *_size(total, responses))
    if total is None:
        return Group(table, Text("sizes are known of folders alone"))
    hint = "per token: prompt_ids per prompt token, everything else per response token"
    return Group(table, Text(hint, style="dim"))


def _size(size: int | None, tokens: int) -> tuple[str, str]:
    if size is None:
        return "?", "?"
    return f"{size:,}", f"{size / tokens:,.2f}" if tokens else ""


def _record(example: Example, decode: Decode | None) -> RenderableType:
    record = example.record
    head = Text()
    head.append(f"{record.prompt_id}", style="bold")
    tokens = len(record.response_ids)
    reward = "" if np.isnan(record.reward) else f", reward {record.reward:g}"
    head.append(f"  sample {record.sample_index}, {counted(tokens, 'token')},"
                f" {record.finish_reason}{reward}")  # fmt: skip
    texts = [("prompt", record.prompt_ids), ("response", record.response_ids)]
    grid = _grid([(name, _text(ids, decode)) for name, ids in texts])
    return Group(head, grid, _tokens(example, decode))


def _text(ids: np.ndarray, decode: Decode | None) -> str:
    if decode is None:
        head = " ".join(str(i) for i in ids[:40].tolist())
        return head + (f" … {len(ids) - 40:,} more" if len(ids) > 40 else "")
    text = decode(ids[:TEXT].tolist())
    text = text.rstrip()
    return text[:TEXT] + ("…" if len(text) > TEXT or len(ids) > TEXT else "")


def _tokens(example: Example, decode: Decode | None) -> RenderableType:
    record = example.record
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("position", "token id", *(() if decode is None else ("token",)), "student",
                  *(f"teacher {name}" for name in example.scores)):  # fmt: skip
        table.add_column(title, justify="left" if title == "token" else "right", no_wrap=True)
    for position, token in enumerate(record.response_ids[:TOKENS].tolist()):
        texts = () if decode is None else (Text(repr(decode([token]))[1:-1]),)
        columns = [record.student_logprob, *(s.logprob for s in example.scores.values())]
        # Adding 0 makes -0.0000 plain.
        values = (f"{round(float(column[position]), 4) + 0.0:.4f}" for column in columns)
        table.add_row(str(position), str(token), *texts, *values)
    rest = len(record.response_ids) - TOKENS
    return Group(table, Text(f"… {rest:,} more tokens")) if rest > 0 else table


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for every table."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console
