"""All programs of a config on a target: compiled, judged, and what would make them fit."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from opd_jax.config import Config
from opd_jax.config_train import TrainRun
from opd_jax.errors import ConfigError
from opd_jax.fit.changes import Case, changed, room_share, steps_of
from opd_jax.fit.compiling import compile_draft
from opd_jax.fit.draft import Draft
from opd_jax.fit.hardware import RESERVE
from opd_jax.fit.results import Bytes, FitReport, ProgramReport, Try
from opd_jax.fit.roofline import COMPUTE, LINKS, MEMORY
from opd_jax.fit.sampling import sampling_drafts
from opd_jax.fit.scoring import scoring_draft
from opd_jax.fit.setup import Setup, open_setup
from opd_jax.fit.training import training_draft

Say = Callable[[str], None]


def stages_of(config: Config, wanted: Sequence[str] | None) -> list[str]:
    """The stages to compile: all that run a model, or those named; `train` is every run.

    Raises:
        ConfigError: a name is none of them.
    """
    runs = [f"train.{name}" for name in config.train.enabled]
    known = ["answer", "sft", "rollout", "score", *runs]
    if wanted is None:
        return known
    for name in wanted:
        if name not in (*known, "train"):
            raise ConfigError(
                f"--stages: '{name}' has no program to compile; choose from {', '.join(known)}"
            )
    return [x for x in known if x in wanted or (x in runs and "train" in wanted)]


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
    for draft in (draft for stage in chosen for draft in drafts_of(setup, stage)):
        say(f"compiling {draft.name}: {draft.what}")
        programs.append(compile_draft(setup, draft))
        if quick and not programs[-1].fits:
            break
    failing = [program for program in programs if not program.fits and not quick]
    programs += within_training(setup, programs)
    return FitReport(
        target=target,
        kind=setup.target.device.kind,
        devices=setup.mesh.size,
        mesh={name: int(size) for name, size in setup.mesh.shape.items()},
        memory_bytes=setup.target.device.memory,
        programs=programs,
        hours=_hours(setup, programs),
        tries=[tried for program in failing for tried in _tries(setup, program, say)],
        assumed=_assumed(setup),
    )


def within_training(setup: Setup, programs: Sequence[ProgramReport]) -> Iterator[ProgramReport]:
    """Sampling and scoring while a run trains: the same programs with more beside them."""
    by_name = {program.name: program for program in programs}
    for name in setup.config.train.enabled:
        run, step = setup.config.train.runs[name], by_name.get(f"train.{name}")
        if step is None or (run.algorithm != "opd" and run.refresh is None):
            continue
        share = _drawn(run) / (setup.prompts("opd") * setup.config.rollout.samples_per_prompt)
        for inner in ("rollout.prefill", "rollout.decode", "score"):
            if (found := by_name.get(inner)) is not None:
                yield dataclasses.replace(
                    found,
                    name=f"{inner} in {step.name}",
                    stage=step.stage,
                    runs=found.runs * share,
                    beside=_beside_training(found, step, run),
                    compile_seconds=0.0,
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
    if found.name == "score":
        beside.pop("teacher", None)  # it is the program's own argument
    elif run.lora is None:
        beside.pop("parameters", None)
        state -= found.parts.get("parameters", 0)
    return {**beside, "training state": state}


def _tries(setup: Setup, failing: ProgramReport, say: Say) -> Iterator[Try]:
    """Changes for one program, each on top of those before, until it fits."""
    name, said = failing.name, list[str]()
    for step in steps_of(name):
        target = setup.target
        case = Case(name, setup.ways, target.count, room_share(failing), target.slices)
        found = step(setup.config, case)
        if found is None:
            continue
        said.append(found[0])
        words = ", ".join(said)
        say(f"{name} does not fit; compiling it with {words}")
        try:
            setup = open_setup(changed(setup.config, found[1]), setup.target.name)
        except ConfigError as error:
            say(f"that is no config: {error}")
            return
        stage = name if case.trains else name.partition(".")[0]
        draft = next(draft for draft in drafts_of(setup, stage) if draft.name == name)
        failing = compile_draft(setup, draft)
        yield Try(name, words, failing.fits, failing.needed_bytes, failing.compile_seconds)
        if failing.fits:
            return


def _hours(setup: Setup, programs: Sequence[ProgramReport]) -> dict[str, float]:
    """Device-hours of every stage all of whose programs have a time."""
    hours: dict[str, float] = defaultdict(float)
    for program in programs:
        seconds = program.time.seconds if program.time else 0.0
        hours[program.stage] += program.runs * seconds * setup.mesh.size / 3600
    unknown = {program.stage for program in programs if program.time is None}
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
