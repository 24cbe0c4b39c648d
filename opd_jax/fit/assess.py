"""All programs of a config on a target: compiled, judged, and what would make them fit."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from opd_jax.config import Config, MeshConfig
from opd_jax.config_train import TrainRun
from opd_jax.errors import ConfigError
from opd_jax.fit.changes import Case, changed, room_share, steps_of
from opd_jax.fit.compiling import compile_draft
from opd_jax.fit.draft import Draft
from opd_jax.fit.evaluation import EVALUATION, evaluation_drafts
from opd_jax.fit.hardware import RESERVE
from opd_jax.fit.results import Bytes, FitReport, ProgramReport, Try
from opd_jax.fit.roofline import COMPUTE, LINKS, MEMORY
from opd_jax.fit.sampling import sampling_drafts
from opd_jax.fit.scoring import scoring_draft
from opd_jax.fit.setup import Setup, open_setup
from opd_jax.fit.targets import larger
from opd_jax.fit.training import training_draft

Say = Callable[[str], None]
WITHOUT_PROGRAM = ("evaluate", "export", "report")
"""Stages that compile nothing of their own."""
WITHIN = " in "
"""Stands between the name of a program and that of the training run in which it runs too."""


def stages_of(config: Config, wanted: Sequence[str] | None) -> list[str]:
    """The stages to compile: all that run a model, or those named; `train` is every run.

    Stages without a program of their own are left out.

    Raises:
        ConfigError: a name is no stage, or none of them has a program.
    """
    runs = [f"train.{name}" for name in config.train.enabled]
    known = ["answer", "sft", "rollout", "score", *runs]
    if wanted is None:
        return known
    for name in wanted:
        if name not in (*known, "train") and name.partition(".")[0] not in WITHOUT_PROGRAM:
            raise ConfigError(f"--stages: '{name}' is no stage; choose from {', '.join(known)}")
    found = [x for x in known if x in wanted or (x in runs and "train" in wanted)]
    if not found:
        raise ConfigError(
            f"--stages: {', '.join(wanted)}: no program to compile; choose from {', '.join(known)}"
        )
    return found


def drafts_of(setup: Setup, stage: str) -> list[Draft]:
    """The programs of a stage."""
    if stage in ("answer", "rollout"):
        return sampling_drafts(setup, "answer" if stage == "answer" else "rollout")
    return [scoring_draft(setup) if stage == "score" else training_draft(setup, stage)]


def assess(
    config: Config, target: str, stages: Sequence[str] | None, say: Say, *, quick: bool = False
) -> FitReport:
    """Compile a config's programs for a target.

    Args:
        stages: as `stages_of` takes them.
        say: told of every program before it is compiled.
        quick: stop at the first program that does not fit, and try no changes.

    Raises:
        OPDError: the target, the config or a model is wrong.
    """
    setup, chosen = open_setup(config, target), stages_of(config, stages)
    programs: list[ProgramReport] = []
    if quick:  # what needs most memory comes first
        chosen.sort(key=lambda stage: not stage.startswith("train."))
    inner = [stage for stage in drawn_with(config, chosen) if stage not in chosen]
    for draft in (draft for stage in chosen + inner for draft in drafts_of(setup, stage)):
        say(f"compiling {draft.name}: {draft.what}")
        programs.append(compile_draft(setup, draft))
        if quick and not programs[-1].fits:
            break
    programs += within_training(setup, programs)
    if "rollout" in chosen and not (quick and not all(program.fits for program in programs)):
        programs += within_evaluations(setup, programs, say)
    programs = [program for program in programs if program.stage not in inner]
    failing = [x for x in programs if not (x.fits or quick or x.name.startswith(EVALUATION))]
    return FitReport(
        target=target,
        kind=setup.target.device.kind,
        devices=setup.mesh.size,
        mesh={name: int(size) for name, size in setup.mesh.shape.items()},
        memory_bytes=setup.target.device.memory,
        programs=programs,
        hours=_hours(setup, programs),
        tries=[tried for program in failing for tried in _tries(setup, program, config.mesh, say)],
        assumed=_assumed(setup),
    )


def drawn_with(config: Config, chosen: Sequence[str]) -> tuple[str, ...]:
    """The stages whose programs run inside the chosen training runs too."""
    runs = [run for name, run in config.train.runs.items() if f"train.{name}" in chosen]
    return ("rollout", "score") if any(run.draws for run in runs) else ()


def within_training(setup: Setup, programs: Sequence[ProgramReport]) -> Iterator[ProgramReport]:
    """Sampling and scoring while a run trains: the same programs with more beside them."""
    by_name = {program.name: program for program in programs}
    for name in setup.config.train.enabled:
        run, step = setup.config.train.runs[name], by_name.get(f"train.{name}")
        if step is None or not run.draws:
            continue
        share = _drawn(run) / (setup.prompts("opd") * setup.config.rollout.samples_per_prompt)
        for inner in ("rollout.prefill", "rollout.decode", "score"):
            if (found := by_name.get(inner)) is not None:
                yield dataclasses.replace(
                    found,
                    name=f"{inner}{WITHIN}{step.name}",
                    stage=step.stage,
                    runs=found.runs * share,
                    beside=_beside_training(found, step, run),
                    compile_seconds=0.0,
                )


def within_evaluations(
    setup: Setup, programs: Sequence[ProgramReport], say: Say
) -> Iterator[ProgramReport]:
    """Fresh samples of runs on stored rollouts, which they take beside their training state.

    Evaluations are left out of the hours, so these count as never run.
    """
    by_name = {program.name: program for program in programs}
    compiled: dict[tuple[str, str], ProgramReport] = {}
    for name in setup.config.train.enabled:
        run, step = setup.config.train.runs[name], by_name.get(f"train.{name}")
        if step is None:
            continue
        for draft in evaluation_drafts(setup, run):
            key = draft.name, draft.what
            if key not in compiled:
                say(f"compiling {draft.name}: {draft.what}")
                compiled[key] = compile_draft(setup, draft)
            yield dataclasses.replace(
                compiled[key],
                name=f"{draft.name}{WITHIN}{step.name}",
                stage=step.stage,
                runs=0.0,
                beside=_beside_training(compiled[key], step, run),
            )


def _drawn(run: TrainRun) -> int:
    """Responses that a run draws itself."""
    if run.refresh is None:
        return run.batch_size * run.steps
    return run.batch_size * max(run.steps - (run.refresh.every or run.steps), 0)


def _beside_training(found: ProgramReport, step: ProgramReport, run: TrainRun) -> Bytes:
    """The state of a run lies beside; what is sampled with are its own parameters."""
    state = sum(step.parts.get(x, 0) for x in ("parameters", "moments", "frozen parameters"))
    beside = {**found.beside, **step.beside}
    if found.name in ("score", f"{EVALUATION}score"):
        beside.pop("teacher", None)  # it is the program's own argument
    elif run.lora is None:
        beside.pop("parameters", None)
        state -= found.parts.get("parameters", 0)
    return {**beside, "training state": state}


def _tries(
    setup: Setup, failing: ProgramReport, mesh: MeshConfig | None, say: Say
) -> Iterator[Try]:
    """Changes for one program, each on top of those before, until it fits.

    A change that is no config for the target is left out.

    Args:
        mesh: as the config has it, for more devices than the setup's.
    """
    name, said = failing.name, list[str]()
    program, _, within = name.partition(WITHIN)
    steps = steps_of(program)

    def tried(made: Callable[[], Setup], words: str) -> Try | None:
        nonlocal setup, failing
        said.append(words)
        say(f"{name} does not fit; compiling it with {', '.join(said)}")
        try:
            setup = made()
        except ConfigError as error:
            say(f"that is no config: {error}")
            said.pop()
            return None
        failing = _again(setup, program, failing.beside if within else None)
        fits, needed = failing.fits, failing.needed_bytes
        return Try(name, ", ".join(said), fits, needed, failing.compile_seconds)

    for step in steps[:1] if within else steps:  # what lies beside stays as it is
        target = setup.target
        case = Case(program, setup.ways, target.count, room_share(failing), target.slices)
        if (change := step(setup.config, case)) is None:
            continue
        config = changed(setup.config, change[1])
        found = tried(functools.partial(open_setup, config, target.name), change[0])
        if found is not None:
            yield found
            if found.fits:
                return
    if not within and (more := larger(setup.target)) is not None:
        config = setup.config.model_copy(update={"mesh": mesh})
        found = tried(functools.partial(open_setup, config, more), f"on {more}")
        if found is not None:
            yield found


def _again(setup: Setup, name: str, beside: Bytes | None) -> ProgramReport:
    """A program compiled once more."""
    stage = name if name.startswith(("sft", "train.")) else name.partition(".")[0]
    draft = next(draft for draft in drafts_of(setup, stage) if draft.name == name)
    found = compile_draft(setup, draft)
    return found if beside is None else dataclasses.replace(found, beside=beside)


def _hours(setup: Setup, programs: Sequence[ProgramReport]) -> dict[str, float]:
    """Device-hours of every stage all of whose programs have a time."""
    hours: dict[str, float] = defaultdict(float)
    for program in programs:
        seconds = program.time.seconds if program.time else 0.0
        hours[program.stage] += program.runs * seconds * setup.mesh.size / 3600
    unknown = {program.stage for program in programs if program.runs and program.time is None}
    return {stage: value for stage, value in hours.items() if stage not in unknown}


def _assumed(setup: Setup) -> list[str]:
    config = setup.config
    return [
        f"{RESERVE:.0%} of a device's memory stays free for the runtime, communication buffers "
        "and fragmentation",
        f"seconds: the longest of compute at {COMPUTE:.0%} of peak, memory at {MEMORY:.0%} and "
        f"links at {LINKS:.0%} of their bandwidth; nothing was measured",
        f"prompts of {config.prompts.max_prompt_tokens:,} tokens and responses of full length; "
        f"{setup.prompts('sft'):,} prompts for SFT and {setup.prompts('opd'):,} for OPD",
        "evaluation, checkpoints, compilation and waiting for data are left out of the hours",
    ]
