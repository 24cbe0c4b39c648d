"""The stages in their order: what is done is skipped, what changed is refused, the rest is run."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from opd_jax.config import Config
from opd_jax.config_load import dump_config
from opd_jax.core.distributed import barrier, everyone, is_first
from opd_jax.core.mesh import axis_size
from opd_jax.core.progress import say, stage_line
from opd_jax.core.run_lock import run_lock
from opd_jax.data.store_files import StoreFiles
from opd_jax.errors import ConfigError, DataError, OPDError
from opd_jax.report.page import build_report
from opd_jax.report.terminal import print_results
from opd_jax.stages import answer, evaluate, export, plan, rollout, score, sft, train
from opd_jax.stages.before import check_inputs
from opd_jax.stages.common import Stage
from opd_jax.stages.context import RunContext
from opd_jax.stages.records import Json, Spent, StageRecords, exists
from opd_jax.stages.summary import write_summary
from opd_jax.train.jobs import check_row_tokens, spread_batches
from opd_jax.train.mesh_choice import mesh_of

PARTS = ("inputs", "run", "artefacts", "extras", "gap")  # not every stage has the last two
TICK_SECONDS = 5.0  # a kill forgets at most so much of a stage's cost


def stages_of(ctx: RunContext) -> list[Stage]:
    """All stages of a config, in order; `report` comes after them and is always made anew."""
    return [
        _stage("answer", answer, ctx),
        _stage("sft", sft, ctx),
        _stage("rollout", rollout, ctx),
        _stage("score", score, ctx),
        *(_stage(f"train.{name}", train, ctx, name) for name in ctx.config.train.enabled),
        *(_stage(f"evaluate.{name}", evaluate, ctx, name) for name in evaluate.names(ctx)),
        *(_stage(f"export.{name}", export, ctx, name) for name in ctx.config.train.enabled),
    ]


def _stage(name: str, module: object, *given: RunContext | str) -> Stage:
    parts = [part for part in PARTS if hasattr(module, part)]
    return Stage(name, **{part: partial(getattr(module, part), *given) for part in parts})


def run(
    config: Config,
    *,
    stages: Sequence[str] | None,
    force: Sequence[str],
    plan_only: bool,
    share: tuple[int, int] | None = None,
    profile: bool = False,
) -> None:
    """Run a config's stages.

    Args:
        stages: names to run (`train` means every `train.NAME`); `None`: all.
        force: stages to redo, complete or not.
        plan_only: print what is done and what is not, and stop.
        share: (index, count); do this share of the one chosen stage alone.

    Raises:
        OPDError: as its message says.
    """
    ctx = open_run(config, writable=not plan_only, share=share, profile=profile)
    all_stages = stages_of(ctx)
    names = [stage.name for stage in all_stages]
    chosen = _select(names, stages, "--stages")
    forced = _select(names, force, "--force") if force else []
    outside = [name for name in forced if name not in chosen]
    if outside:
        raise ConfigError(f"--force {outside[0]} is outside --stages; name it there too")
    if plan_only:
        plan.print_plan(ctx, all_stages, chosen, forced)
        return
    with run_lock(ctx.run_dir, shared=share is not None):
        store = f"store {config.store}, " if config.store else ""
        say(f"run_dir {_shown(ctx.run_dir)}, {store}{_devices(ctx.mesh)}")
        check_inputs(ctx, {name.split(".")[0] for name in chosen})
        ctx.records.redo(forced)
        for stage in all_stages:
            barrier(stage.name)
            if stage.name in chosen:
                _run_stage(ctx, stage, forced)
                ctx.release_models()
        if share is None:
            _report(ctx, names, tables=stages is None or "report" in stages)
        ctx.records.all_redone(forced)


def open_run(
    config: Config,
    writable: bool = True,
    share: tuple[int, int] | None = None,
    profile: bool = False,
) -> RunContext:
    """The context of a config; makes the run folder unless nothing is to be written.

    Raises:
        ConfigError: the folder cannot be written, or the mesh does not fit the devices.
        DataError: `store` cannot be written.
    """
    run_dir = Path(config.run_dir)
    if writable:
        _make_folder(run_dir)
        if config.store is not None:
            StoreFiles(config.store).check_writable(f".write-{uuid.uuid4().hex}")
    mesh = mesh_of(config)
    config, changes = spread_batches(config, axis_size(mesh, "batch"))
    for line in changes:
        say(line)
    check_row_tokens(config, axis_size(mesh, "time"))
    return RunContext(config, run_dir, mesh, StageRecords(run_dir), profile, share)


def _make_folder(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".write-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"run_dir '{run_dir}' cannot be written ({error.strerror}); choose another folder"
        ) from error


def _write_config(ctx: RunContext) -> None:
    if is_first() and ctx.share is None:
        partial_file = ctx.run_dir / ".config.yaml.tmp"
        partial_file.write_text(dump_config(ctx.config), encoding="utf-8")
        partial_file.replace(ctx.run_dir / "config.yaml")


def _select(names: Sequence[str], wanted: Sequence[str] | None, flag: str) -> list[str]:
    if wanted is None:
        return list(names)
    kinds = {*names, *(name.split(".")[0] for name in names), "report"}
    for name in wanted:
        if name not in kinds:
            raise ConfigError(f"{flag} {name}: no such stage; there are {', '.join(names)}, report")
    return [name for name in names if name in wanted or name.split(".")[0] in wanted]


def _run_stage(ctx: RunContext, stage: Stage, forced: Sequence[str]) -> None:
    inputs, written = stage.inputs(), [*stage.artefacts(), *stage.extras()]
    if stage.name in forced:
        if not ctx.records.is_redone(stage.name, inputs, forced):
            ctx.records.set_aside(stage.name, written, inputs)
        else:
            done = ctx.records.done(stage.name) is not None
            how = "was done by the same --force" if done else "goes on: --force has begun it before"
            say(stage_line(stage.name, how))
        barrier(f"aside {stage.name}")
    here = all(exists(artefact) for artefact in stage.artefacts())
    if not here and not any(exists(artefact) for artefact in written):
        ctx.records.drop_started(stage.name)  # it wrote nothing: nothing binds it to old inputs
    barrier(f"inputs of {stage.name}")
    ctx.records.check_inputs(stage.name, inputs)
    record = ctx.records.done_everywhere(stage.name, here=here)
    gap = "" if record is None else stage.gap(record["outputs"])
    if record is not None and not gap:
        say(stage_line(stage.name, f"done before, in {record['seconds']:.1f} s"))
        ctx.records.drop_aside(stage.name, written)  # if the process was killed just then
        return
    if gap:
        say(stage_line(stage.name, f"done before, but {gap}: making it good"))
    barrier(f"start of {stage.name}")
    _write_config(ctx)
    before = ctx.records.done(stage.name)
    part = stage.name if ctx.share is None else "{}.share-{}-of-{}".format(stage.name, *ctx.share)
    try:
        with _timed(ctx, part, inputs) as elapsed:
            outcome = stage.run()
            spent = elapsed()
    except BaseException as error:
        ctx.records.put_back(stage.name, written)
        if isinstance(error, OPDError) and not isinstance(error.__cause__, OSError):
            ctx.records.forget_begun(stage.name)  # it may be what the message asks for
        raise
    barrier(f"end of {stage.name}")
    if ctx.share is not None:
        ctx.records.tick(part, inputs, spent)
        spent = Spent()  # it is among those of the shares
    if not outcome.complete:
        say(stage_line(stage.name, "this share is done, others are not"))
        return
    cost = _cost(ctx, stage.name, spent, record)  # before the look: who ends it drops the shares'
    found = {"inputs": inputs, "outputs": outcome.outputs, "counts": outcome.counts, **cost}
    _finish(ctx, stage.name, found, before)
    ctx.records.drop_aside(stage.name, written)
    if stage.name not in forced:
        ctx.records.forget_begun(stage.name)


def _finish(ctx: RunContext, name: str, found: Json, before: Json | None) -> None:
    """Mark a stage complete, unless another share has just done so: its cost is the whole one.

    Args:
        before: the stage's record when this run of it began.
    """
    if ctx.share is not None and ctx.records.done(name) not in (None, before):
        ctx.records.drop_started(name)
    else:
        ctx.records.finish(name, found)


def _cost(ctx: RunContext, name: str, spent: Spent, before: Json | None) -> Json:
    """What this run and all shares took, and what that took `before` which is made good now."""
    shares = ctx.records.shares_spent(name)
    longest = max((share.seconds for share in shares), default=0.0)
    parts = [spent, *shares, *([] if before is None else [Spent.of(before)])]
    taken = Spent(
        spent.seconds + longest + (0.0 if before is None else before["seconds"]),
        sum(part.device_seconds for part in parts),
    )
    return {**taken.to_json(), "peak_host_gib": peak_host_gib()}


def peak_host_gib() -> float:
    """The largest resident memory of this process so far; earlier stages count."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


@contextlib.contextmanager
def _timed(ctx: RunContext, name: str, inputs: Json) -> Generator[Callable[[], Spent]]:
    """What a stage has taken, interrupted tries included; noted on disk as it passes."""
    earlier = ctx.records.start(name, inputs)
    began = time.monotonic()
    over = threading.Event()

    def elapsed() -> Spent:
        return earlier.more(time.monotonic() - began, ctx.mesh.size)

    def note() -> None:
        with contextlib.suppress(DataError):  # a full disk is told by what has to be written
            ctx.records.tick(name, inputs, elapsed())

    def note_on() -> None:
        while not over.wait(TICK_SECONDS):
            note()

    thread = threading.Thread(target=note_on, daemon=True)
    thread.start()
    try:
        yield elapsed
    except BaseException:
        note()
        raise
    finally:
        over.set()
        thread.join()


def _report(ctx: RunContext, names: list[str], *, tables: bool) -> None:
    """Summary and page are made anew every time; the tables are for a run that asked for them."""
    summary = write_summary(ctx, names)
    if not is_first():
        return
    page = build_report(ctx.run_dir)
    if tables:
        print_results(summary)
    models = [
        _shown(folder)
        for name in ctx.config.train.enabled
        for folder in export.artefacts(ctx, name)
        if ctx.records.done(f"export.{name}")
    ]
    if models:
        say(f"models: {', '.join(models)}")
    for name, note in summary["teacher_mismatch"].items():
        say(f"WARNING: {name}: {note}")
    say(f"report: {_shown(page)}")


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _devices(mesh: Mesh) -> str:
    """All devices and how the mesh cuts them; of several processes, which host each is on and how
    many it sees itself."""
    device, count = jax.devices()[0], jax.device_count()
    kind = "" if device.device_kind == device.platform else f" ({device.device_kind})"
    text = f"{count} {device.platform} device{'s' if count > 1 else ''}{kind}"
    cuts = ", ".join(f"{axis} {ways}" for axis, ways in mesh.shape.items() if ways > 1)
    laid = f", mesh {cuts}" if cuts else ""
    hosts = everyone(f"{socket.gethostname()}: {jax.local_device_count()}")
    if len(hosts) == 1:
        return text + laid
    lines = (f"\n  process {rank} on {host} of them" for rank, host in enumerate(hosts))
    return f"{text} in {len(hosts)} processes{laid}" + "".join(lines)
