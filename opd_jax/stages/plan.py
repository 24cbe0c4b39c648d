"""`--plan`: what is done, what is pending or changed, and about what each part will cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from opd_jax.config import Config
from opd_jax.core.distributed import is_first
from opd_jax.report.terminal import WIDEST
from opd_jax.stages.common import Stage
from opd_jax.stages.context import RunContext
from opd_jax.stages.cost import Estimate, estimate, matmul_rate
from opd_jax.stages.records import exists

EFFICIENCY = 0.3  # of the matrix-product rate, for a first guess
CHANGES_SHOWN = 2

Kind = Literal["done", "pending", "changed"]


class State(NamedTuple):
    """How far a stage is. `changed`: a run refuses it unless it is forced."""

    kind: Kind
    text: str


def states_of(
    ctx: RunContext, stages: Sequence[Stage], chosen: Sequence[str], forced: Sequence[str]
) -> dict[str, State]:
    """The states of the chosen stages, by the comparison of inputs that a run makes.

    What stands on a changed stage is changed as well, since its inputs will be others. What stands
    on a stage that is only pending keeps its state: the same inputs give the same outputs.
    """
    states: dict[str, State] = {}
    changed: set[str] = set()
    for stage in stages:
        if stage.name not in chosen:
            continue
        needs = needs_of(ctx.config, stage.name)
        source = next((name for name in needs if name in changed), None)
        ready = all(states[name].kind == "done" for name in needs if name in states)
        changes = _changes(ctx, stage) if source is None and ready else []
        if source is not None or changes:
            changed.add(stage.name)
        states[stage.name] = _state(ctx, stage, changes, source, stage.name in forced)
        if ready and states[stage.name].kind == "done" and (gap := _gap(ctx, stage)):
            states[stage.name] = State("pending", f"pending ({gap})")
    return states


def needs_of(config: Config, name: str) -> tuple[str, ...]:
    """The stages whose outputs are among a stage's inputs."""
    kind, _, run_name = name.partition(".")
    if kind == "train":
        source = {"lightning_opd": ("rollout", "score"), "opd": (), "sft": ("answer",)}
        return ("sft", *source[config.train.runs[run_name].algorithm])
    if kind in ("evaluate", "export"):
        return {"base": (), "teacher": (), "sft": ("sft",)}.get(run_name, (f"train.{run_name}",))
    return {"answer": (), "sft": ("answer",), "rollout": ("sft",), "score": ("rollout",)}[kind]


def _changes(ctx: RunContext, stage: Stage) -> list[str]:
    """What differs from the inputs that the stage, complete or under way, was started with."""
    record = ctx.records.done(stage.name)
    if record is None and (record := ctx.records.started(stage.name)) is not None:
        # A run forgets a start that wrote nothing.
        record = record if any(exists(artefact) for artefact in stage.artefacts()) else None
    if record is None:
        return []
    return [
        f"{key} {old} -> {new}" for key, old, new in ctx.records.changes(record, stage.inputs())
    ]


def _gap(ctx: RunContext, stage: Stage) -> str:
    return stage.gap(ctx.records.outputs(stage.name, stage.name))


def _state(
    ctx: RunContext, stage: Stage, changes: list[str], source: str | None, forced: bool
) -> State:
    done, started = ctx.records.done(stage.name), ctx.records.started(stage.name)
    if forced or (done is None and started is None):
        return State("pending", "pending (--force)" if forced else "pending")
    if source is not None:
        return State("changed", f"follows {source} (--force {stage.name})")
    if changes:
        more = len(changes) - CHANGES_SHOWN
        shown = ", ".join(changes[:CHANGES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return State("changed", f"changed: {shown} (--force {stage.name})")
    if done is None:
        return State("pending", "under way")
    here = all(exists(artefact) for artefact in stage.artefacts())
    return State("done", "done") if here else State("pending", "pending (its files are gone)")


def print_plan(
    ctx: RunContext, stages: Sequence[Stage], chosen: Sequence[str], forced: Sequence[str]
) -> None:
    """Print a line a stage. Tokens are upper bounds: every response at its full length."""
    states = states_of(ctx, stages, chosen, forced)
    todo = {name: estimate(ctx, name) for name, state in states.items() if state.kind != "done"}
    rate = matmul_rate() if todo else 1.0
    speed = rate * EFFICIENCY * ctx.mesh.size
    table = Table(title=f"plan of {ctx.run_dir}", box=None, header_style="bold")
    for column in ("stage", "state", "tokens", "on disk", "time"):
        left = column in ("stage", "state")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for name, state in states.items():
        if name in todo:
            table.add_row(name, state.text, *_guess(todo[name], speed))
        else:
            table.add_row(name, state.text, *_spent(ctx, name))
    table.add_row("report", "always made anew", "", "", "")
    table.add_section()
    if todo:
        table.add_row("total", f"{len(todo)} to do", *_guess(_sum(list(todo.values())), speed))
    else:
        spent = sum(record["seconds"] for name in states if (record := ctx.records.done(name)))
        table.add_row("total", "nothing to do", "", "", _duration(spent))
    if is_first():
        _show(table, states, forced, rate if todo else None)


def _show(
    table: Table, states: dict[str, State], forced: Sequence[str], rate: float | None
) -> None:
    """Print the table, what to add to the command, and what the times are."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDEST)
    console.print(table)
    changed = [name for name, state in states.items() if state.kind == "changed"]
    if changed:
        words = ",".join([*forced, *changed])
        console.print(f"A run stops at {changed[0]}; to redo: --force {words}", soft_wrap=True)
    if rate is not None:
        console.print(
            f"Times are guesses from {rate / 1e9:,.0f} GFLOP/s measured now on one device, "
            f"{EFFICIENCY:.0%} of it used; responses at full length.",
            style="dim",
        )


def _guess(cost: Estimate, speed: float) -> tuple[str, str, str]:
    """Tokens, bytes on disk and time; what is nothing is left blank."""
    return (
        f"<= {cost.tokens:,}" if cost.tokens else "",
        _bytes(cost.stored_bytes) if cost.stored_bytes else "",
        f"~ {_duration(cost.flops / speed)}",
    )


def _sum(costs: list[Estimate]) -> Estimate:
    return Estimate(*(sum(column) for column in zip(*costs, strict=True)))


def _spent(ctx: RunContext, name: str) -> tuple[str, str, str]:
    record = ctx.records.done(name) or {"counts": {}, "seconds": 0.0}
    tokens = record["counts"].get("tokens")
    return "" if tokens is None else f"{tokens:,}", "", _duration(record["seconds"])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"
