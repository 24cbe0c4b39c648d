"""The training loop: resume, step, log one step late, save."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.algo.losses import averages
from opd_jax.config import LoopConfig
from opd_jax.core.mesh import put_batch
from opd_jax.errors import DataError
from opd_jax.model.lora import Adapters
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.train import checkpoint
from opd_jax.train.optimizer import learning_rate, make_optimizer, result_of
from opd_jax.train.step import Objective, TrainState, abstract_state, init_state, make_train_step

NextBatch = Callable[[int, Callable[[], Params]], Any]
Source = Callable[[int], NextBatch]
"""From the step to start at to a function `(step, current) -> host batch`; `current()` gives the
parameters of that step, which cost something to make where only adapters are trained."""
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
    keep: int = 2

    @property
    def adapters(self) -> Adapters | None:
        """What is trained, unless it is all parameters."""
        return None if self.loop.lora is None else Adapters(self.model, self.loop.lora)


def run_training(job: TrainJob, params: Params, source: Source, log: Log) -> tuple[Params, int]:
    """Train to the last step, from the newest checkpoint in `job.directory` if there is one.

    Args:
        params: where a fresh run starts, or what adapters are added to; left untouched.
        source: the batches; what step s gets does not depend on where the run started.
        log: called with a step and its metrics after the next step is on its way.

    Returns:
        the parameters (their moving average with `optim.ema`; adapters are merged), and the
        target tokens of all steps, earlier tries included.

    Raises:
        DataError: a loss or gradient norm is not finite (the last checkpoint is from before), or
            a checkpoint is damaged.
    """
    adapters = job.adapters
    optimizer = make_optimizer(adapters or job.model, job.loop)
    pieces = job.loop.batch_size // (job.loop.micro_batch_size or job.loop.batch_size)
    step_fn = make_train_step(job.model, job.objective, optimizer, pieces, adapters)
    frozen = (params,) if adapters else ()
    state, tokens = _resume(job, optimizer, adapters.init(job.seed) if adapters else params)

    def whole(trained: Params) -> Params:
        return adapters.merge(params, trained) if adapters else trained

    start = int(state.step)
    next_batch = source(start)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    for step in range(start, job.loop.steps):
        batch = next_batch(step, functools.partial(whole, state.params))
        state, metrics = step_fn(state, _put(job.model, batch), *frozen)
        if pending is not None:
            tokens += _log(job, log, *pending)
        pending = (step, metrics)
        if (step + 1) % job.loop.save_every == 0 or step + 1 == job.loop.steps:
            tokens += _log(job, log, *pending)  # a step that is not finite is never saved
            pending = None
            meta = {"inputs": job.inputs, "tokens": tokens}
            checkpoint.save(job.directory, step + 1, state, meta, keep=job.keep)
    return whole(result_of(state.params, state.opt_state)), tokens


def _resume(job: TrainJob, optimizer: Any, params: Params) -> tuple[TrainState, int]:
    if checkpoint.latest_step(job.directory) is None:
        return init_state(job.adapters or job.model, optimizer, params), 0
    dtype = str(jax.tree.leaves(params)[0].dtype)
    abstract = abstract_state(job.adapters or job.model, optimizer, dtype)
    state, meta, step = checkpoint.restore(job.directory, None, abstract)
    if meta["inputs"] != job.inputs:
        raise DataError(
            f"{job.directory}: step {step} was trained with other settings or inputs; "
            "redo the stage with --force"
        )
    return state, meta["tokens"]


def _put(model: LanguageModel, batch: Any) -> Any:
    return batch if model.mesh is None else put_batch(model.mesh, batch)


def _log(job: TrainJob, log: Log, step: int, metrics: dict[str, jax.Array]) -> int:
    """Returns the step's target tokens."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not all(abs(values[name]) < float("inf") for name in ("loss", "grad_norm")):
        raise DataError(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; the last "
            f"checkpoint in {job.directory} is from before; lower optim.learning_rate and "
            "redo the stage with --force"
        )
    own = {name: values.pop(name) for name in ("loss", "grad_norm", "update_ratio")}
    rate = jnp.asarray(learning_rate(job.loop.optim, job.loop.steps)(step))
    log(step, {**own, "learning_rate": float(rate), **averages(values)})
    return int(values["tokens"])
