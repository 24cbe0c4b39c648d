"""The tables that end a run on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from opd_jax.report.tables import result_rows, stage_rows

WIDEST = 140
"""Columns that a table may take although the terminal is narrower: a cut figure is worse."""


def print_results(summary: Mapping[str, Any]) -> None:
    """Print the results and the stages of a `summary.json`; a table without rows is left out."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDEST)
    results = [(row.name, *row.cells()) for row in result_rows(summary)]
    header = ("checkpoint", "accuracy %", "greedy %", "reverse KL, nats/token", "problems")
    _print(console, header, results)
    stages = [(row.name, *row.cells()) for row in stage_rows(summary.get("stages", {}))]
    _print(console, ("stage", "seconds", "tokens", "tokens/s", "device-hours"), stages)


def _print(console: Console, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, title in enumerate(header):
        table.add_column(title, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
