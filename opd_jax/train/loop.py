"""The training loop: resume, step, log one step late, save."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.algo.losses import averages
from opd_jax.config_train import LoopConfig
from opd_jax.core.distributed import is_first
from opd_jax.core.mesh import put_batch
from opd_jax.core.preemption import Preemption
from opd_jax.core.progress import say
from opd_jax.core.trace import Trace
from opd_jax.errors import DataError, Preempted
from opd_jax.model.lora import Adapters
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.train import checkpoint
from opd_jax.train.batch_source import Source
from opd_jax.train.checkpoint import Saver
from opd_jax.train.meter import Load, Meter
from opd_jax.train.optimizer import learning_rate, make_optimizer, result_of
from opd_jax.train.step import Objective, TrainState, abstract_state, init_state, make_train_step
from opd_jax.train.watch import Watch

SHOWN_NAMES = 3  # of the records of a step that is not finite
MOST_SKIPPED = 10  # steps in a row without a finite loss: it will not get better

Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainJob:
    """What to train, how, and where its state is kept."""

    model: LanguageModel
    objective: Objective
    loop: LoopConfig
    directory: Path
    inputs: str
    """Fingerprint of what the run depends on: a state of other inputs is not resumed."""
    seed: int = 0
    """Of fresh adapters, with `loop.lora`."""
    profile: Path | None = None
    """Where to write a trace of a few steps."""
    keep: int = 2
    lineage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The ancestors of the state, as JSON values, kept with it."""

    @property
    def adapters(self) -> Adapters | None:
        """What is trained, unless it is all parameters."""
        return None if self.loop.lora is None else Adapters(self.model, self.loop.lora)


class TrainResult(NamedTuple):
    """What a run ends with.

    Attributes:
        params: of the whole model: adapters are merged, with `optim.ema` it is the average.
        steps: how many were done.
        best: how many steps the parameters have, where they are not those of the last.
        tokens: target tokens of all steps, earlier tries included.
        skipped: steps among them that changed no parameter, as they were not finite.
    """

    params: Params
    steps: int
    best: int | None
    tokens: int
    skipped: int


def run_training(
    job: TrainJob,
    start: Callable[[], Params],
    source: Source,
    log: Log,
    watch: Watch | None = None,
) -> TrainResult:
    """Train to the last step, from the newest checkpoint in `job.directory` if there is one.

    Args:
        start: gives the float32 parameters to begin with, or those that adapters are added to.
        log: called with a step and its metrics after the next step is on its way.
        watch: evaluates the run, and may end it before its last step.

    Raises:
        DataError: a step is not finite (and is not to be skipped, or many in a row are not), or a
            checkpoint is damaged or cannot be written.
        Preempted: SIGTERM came; the state is saved.
    """
    adapters = job.adapters
    optimizer = make_optimizer(adapters or job.model, job.loop)
    step_fn = make_train_step(job.model, job.objective, optimizer, source.pieces, adapters)
    frozen = [start()] if adapters else []
    state, past = _resume(job, optimizer, start, watch)

    def whole(trained: Params) -> Params:
        return adapters.merge(frozen[0], trained) if adapters else trained

    def model_of(state: TrainState) -> Params:
        return whole(result_of(state.params, state.opt_state))

    done, unseen = int(state.step), past.unseen
    run = _Run(job, log, source, past, watch, done)
    if not done:
        run.evaluate(0, functools.partial(model_of, state))
    with Preemption() as notice, closing(run.trace), Saver(job.directory, job.keep) as saver:
        while unseen or not run.ends(done, notice):
            if not unseen:
                batch = run.draw(done, functools.partial(whole, state.params), notice)
                if batch is None:
                    break
                state, metrics = step_fn(state, _put(job.model, batch), *frozen)
                run.began(done, batch, metrics)
                saver.settle()
                done += 1
                notice.ask()
            if unseen := not run.evaluate(done, functools.partial(model_of, state), notice):
                run.save(saver, done, state, unseen=True)
                break
            run.keep(saver, done, state)
        if notice.came:
            run.save(saver, done, state)
    if notice.came:
        where = f"step {done} is saved in {job.directory}" if done else "no step is done yet"
        raise Preempted(f"SIGTERM: {where}")
    return _result(run, model_of(state), done)


def is_evaluated(directory: Path, step: int) -> bool:
    """Whether a state was saved after its evaluation, or with none to come."""
    return not checkpoint.meta_of(directory, step)["past"].get("unseen", False)


class _Past(NamedTuple):
    """What a checkpoint tells of the steps before it."""

    tokens: int = 0
    skipped: int = 0
    in_a_row: int = 0
    unseen: bool = False  # whether its evaluation is still to come


class _Run:
    """The step under way: its metrics are read once the next one has begun."""

    def __init__(
        self,
        job: TrainJob,
        log: Log,
        source: Source,
        past: _Past,
        watch: Watch | None,
        done: int,
    ) -> None:
        self.job, self._log, self._source, self.watch = job, log, source, watch
        self._next_batch = source.start(done)
        self.saved = done
        self.meter = Meter(job.model, frozen=job.loop.lora is not None)
        self.tokens, self.skipped, self.in_a_row, _ = past
        self._schedule = learning_rate(job.loop.optim, job.loop.steps)
        self.trace = Trace(job.profile)
        self._pending: tuple[int, Load, dict[str, jax.Array]] | None = None

    def draw(self, step: int, current: Callable[[], Params], notice: Preemption) -> Any | None:
        """The step's batch; `None`: SIGTERM came. What rollouts take, minutes, can be given up."""
        self.trace.step()
        if self._source.draws and self._at_rest(step):
            self.flush()  # what a draw takes belongs to the step that it is for
        start = time.monotonic()

        def ready() -> Params:  # the step before is no part of the wait
            nonlocal start
            params = jax.block_until_ready(current())
            start = time.monotonic()
            return params

        try:
            with notice.raised(self._at_rest(step)):
                batch = self._next_batch(step, ready)
        except Preempted:
            return None
        self.meter.waited(time.monotonic() - start)
        return batch

    def _at_rest(self, done: int) -> bool:
        """Whether the run can be resumed after so many steps."""
        return done % self._source.stride == 0

    def began(self, step: int, batch: Any, metrics: dict[str, jax.Array]) -> None:
        self.flush()
        self._pending = step, Load.of(batch, self._source.pieces), metrics

    def over(self, done: int) -> bool:
        """Whether the step before was the last."""
        return done == self.job.loop.steps or (self.watch is not None and self.watch.stopped)

    def ends(self, done: int, notice: Preemption) -> bool:
        """Whether the step before was the last, or the last before the machine goes."""
        return self.over(done) or (notice.came and self._at_rest(done))

    def evaluate(
        self, done: int, params: Callable[[], Params], notice: Preemption | None = None
    ) -> bool:
        """Evaluate if it is time to; False: SIGTERM came, and it is left to the next try."""
        if self.watch is None or not self.watch.due(done):
            return True
        self.flush()
        # Of rounds: the next try would not yet have the rollouts of the one under way.
        given_up = notice and notice.raised(self._at_rest(done) and self.watch.rounds is None)
        try:
            self.watch.look(done, params, given_up)
        except Preempted:
            if notice is None:  # nothing is done yet
                raise
            return False
        self.meter.pause()
        return True

    def save(self, saver: Saver, done: int, state: TrainState, *, unseen: bool = False) -> None:
        """Begin to save the state after so many steps; `unseen`: it is still to be evaluated."""
        if done == self.saved:  # it is not removed to be saved once more, as evaluated
            return
        self.flush()  # it stops at a step that is not finite, or counts it as skipped
        past = _Past(self.tokens, self.skipped, self.in_a_row, unseen)
        watch = None if self.watch is None else self.watch.state()
        ancestors = {"inputs": self.job.inputs, "lineage": dict(self.job.lineage)}
        saver.save(done, state, {**ancestors, "past": past._asdict(), "watch": watch})
        self.saved = done
        self.meter.pause()

    def keep(self, saver: Saver, done: int, state: TrainState) -> None:
        """Begin a round and save, each if it is time to."""
        turned = self.watch is not None and self.watch.turn(done)
        if turned or self.over(done) or done % self.job.loop.save_every == 0:
            self.save(saver, done, state)
        if turned:  # a round is drawn from a state that is there
            saver.finish()

    def flush(self) -> None:
        if self._pending is None:
            return
        (step, load, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.tokens += int(values["tokens"])
        own = {name: values.pop(name) for name in ("loss", "grad_norm", "update_ratio")}
        own["learning_rate"] = float(jnp.asarray(self._schedule(step)))
        if values.pop("sound") and math.isfinite(own["update_ratio"]):
            self.in_a_row = 0
        else:
            self._unsound(step, own)
            own["skipped"] = 1.0
        self._log(step, {**own, **averages(values), **self.meter.figures(load, values["tokens"])})

    def _records(self, step: int) -> str:
        """A step's records: a few by name, and the file with all names if there are more."""
        names = [] if self._source.names is None else self._source.names(step)
        if len(names) <= SHOWN_NAMES:
            return f", of {', '.join(names)}" if names else ""
        few = f", of {', '.join(names[:SHOWN_NAMES])} and {len(names) - SHOWN_NAMES} more"
        path = self.job.directory.with_name(f"{self.job.directory.name}.step{step}.txt")
        if is_first():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(names) + "\n", encoding="utf-8")
            except OSError:  # the step is told all the same
                return few
        return f"{few} (all in {path})"

    def _unsound(self, step: int, own: dict[str, float]) -> None:
        """Count a step that changed no parameter, or end the run: always if it did change them."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        what = (
            f"step {step}: loss {own['loss']:g}, gradient norm {own['grad_norm']:g}, update ratio "
            f"{own['update_ratio']:g}{self._records(step)}"
        )
        skips = self.job.loop.on_nonfinite == "skip" and math.isfinite(own["update_ratio"])
        if skips and self.in_a_row < MOST_SKIPPED:
            say(f"WARNING: {what}; skipped")
            return
        again, skip = f"; the {self.in_a_row}th in a row", ""
        if self.job.loop.on_nonfinite == "stop":
            again, skip = "", ", or set on_nonfinite=skip to leave such steps out"
        raise DataError(
            f"{what}{again}; the last checkpoint in {self.job.directory} is from before; lower "
            f"optim.learning_rate and redo the stage with --force{skip}"
        )


def _result(run: _Run, params: Params, done: int) -> TrainResult:
    best = None
    if run.watch is not None:
        dtype = str(jax.tree.leaves(params)[0].dtype)
        params, best = run.watch.chosen(params, run.job.model.abstract(dtype))
    return TrainResult(params, done, best, run.tokens, run.skipped)


def _resume(
    job: TrainJob, optimizer: Any, start: Callable[[], Params], watch: Watch | None
) -> tuple[TrainState, _Past]:
    adapters, newest = job.adapters, checkpoint.newest_step(job.directory)
    if newest is None:
        if watch is not None:
            watch.restore(0, None)
        first = adapters.init(job.seed) if adapters else start()
        return init_state(adapters or job.model, optimizer, first), _Past()
    abstract = abstract_state(adapters or job.model, optimizer)
    state, meta, step = checkpoint.restore(job.directory, newest, abstract)
    if meta["inputs"] != job.inputs:
        raise DataError(
            f"{job.directory}: step {step} was trained with other settings or inputs; "
            "redo the stage with --force"
        )
    past = _Past(**meta["past"])
    if watch is not None:
        watch.restore(step, meta["watch"], unseen=past.unseen)
    return state, past


def _put(model: LanguageModel, batch: Any) -> Any:
    return batch if model.mesh is None else put_batch(model.mesh, batch)
