"""A `FitReport` as tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from opd_jax.fit.hardware import GIB
from opd_jax.fit.results import Bytes, FitReport, ProgramReport

WIDEST = 165
"""Columns that a table may take although the terminal is narrower: a cut figure is worse."""
PARTS_SHOWN, COLLECTIVES_SHOWN = 3, 4


def tell(text: str) -> None:
    """A line about what is being done (`core.progress.say` would start a JAX backend)."""
    Console(highlight=False).print(text, markup=False, soft_wrap=True)


def print_report(report: FitReport, console: Console | None = None) -> None:
    """Print everything: memory, work and time, what is sent, hours, and what would fit."""
    console = console or Console(highlight=False)
    console.width = max(console.width, WIDEST)
    console.print(_heading(report))
    console.print(_memory(report))
    for program in report.programs:
        if program.problem:
            console.print(f"  {program.name}: {program.problem}", style="red", markup=False)
        if program.host:
            held = ", ".join(f"{name} {size(count)}" for name, count in program.host.items())
            console.print(f"  {program.name}: in the host's memory, of each device: {held}")
    console.print(_work(report))
    if any(program.collectives for program in report.programs):
        console.print(_sent(report))
    if report.hours:
        console.print(_hours(report))
    for tried in report.tries:
        verdict = "[green]fits[/]" if tried.fits else "[red]does not fit[/]"
        needed = size(tried.needed_bytes) if tried.needed_bytes else "unknown memory"
        console.print(f"tried {tried.program} with {tried.change}: {verdict}, {needed} a device")
    for mesh in report.meshes:
        fate = f"{mesh.hours:,.3g} device-hours" if mesh.hours is not None else "does not fit"
        console.print(f"mesh {_mesh(mesh.mesh)}: {fate}, {size(mesh.needed_bytes)} a device")
    for text in report.assumed:
        console.print(f"- {text}", style="dim", soft_wrap=True)
    verdict = "[bold green]fits[/]" if report.fits else "[bold red]does not fit[/]"
    console.print(f"{report.target}: {verdict}")


def size(count: float) -> str:
    """Bytes in the unit that leaves one to three digits."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,.0f} B"


def duration(seconds: float) -> str:
    """Seconds with a fitting unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:,.3g} us"
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def _heading(report: FitReport) -> str:
    return (
        f"[bold]{report.target}[/]: {report.devices} x {report.kind} with "
        f"{size(report.memory_bytes)} each; mesh {_mesh(report.mesh)}"
    )


def _mesh(sizes: dict[str, int]) -> str:
    """The axes that cut something."""
    cuts = ", ".join(f"{axis} {ways}" for axis, ways in sizes.items() if ways > 1)
    return cuts or "of one device"


def _table(title: str, *columns: str, left: int = 2) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _memory(report: FitReport) -> Table:
    columns = ("program", "fits", "alone", "needed", "free", "compiled in", "largest parts")
    table = _table("memory of a device", *columns, left=2)
    table.columns[-1].justify = "left"
    for program in report.programs:
        table.add_row(
            program.name,
            "[green]yes[/]" if program.fits else "[red]no[/]",
            size(program.peak_bytes),
            size(program.needed_bytes),
            size(program.free_bytes),
            f"{program.compile_seconds:,.0f} s" if program.compile_seconds else "",
            _largest(program),
        )
    return table


def _largest(program: ProgramReport) -> str:
    everything: Bytes = dict(program.parts)
    for name, count in program.beside.items():
        everything[name] = everything.get(name, 0) + count
    largest = sorted(everything.items(), key=lambda item: -item[1])[:PARTS_SHOWN]
    return ", ".join(f"{name} {size(count)}" for name, count in largest if count)


def _work(report: FitReport) -> Table:
    columns = ("program", "shapes", "TFLOP", "/ model", "HBM", "sent", "time", "tokens/s", "MFU")
    table = _table("a run of each program", *columns, "bound by", left=2)
    for program in report.programs:
        if program.time is None:
            table.add_row(program.name, program.what)
            continue
        ratio = program.flops / program.model_flops if program.model_flops else 0.0
        table.add_row(
            program.name,
            program.what,
            f"{program.flops / 1e12:,.4g}",
            f"{ratio:.2f}",
            size(program.traffic_bytes),
            size(sum(x.sent_bytes for x in program.collectives)),
            duration(program.time.seconds),
            f"{program.tokens_per_second or 0:,.0f}",
            f"{program.mfu:.1%}" if program.mfu is not None else "",
            program.time.bound,
        )
    return table


def _sent(report: FitReport) -> Table:
    columns = ("program", "collective", "axes", "times", "bytes", "over the network")
    table = _table("sent by a device in a run", *columns, left=3)
    for program in report.programs:
        for number, found in enumerate(program.collectives[:COLLECTIVES_SHOWN]):
            table.add_row(
                "" if number else program.name,
                found.kind,
                found.axes,
                f"{found.count:,}",
                size(found.sent_bytes),
                size(found.network_bytes) if found.network_bytes else "",
            )
    return table


def _hours(report: FitReport) -> Table:
    table = _table("device-hours of the config", "stage", "device-hours", "hours", left=1)
    for stage, hours in report.hours.items():
        table.add_row(stage, f"{hours:,.3g}", f"{hours / report.devices:,.3g}")
    total = sum(report.hours.values())
    table.add_section()
    table.add_row("all", f"{total:,.3g}", f"{total / report.devices:,.3g}")
    return table
