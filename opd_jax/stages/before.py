"""What is wrong with prompt files and vocabularies is said before hours of work."""

from __future__ import annotations

from collections.abc import Mapping

from opd_jax.config import EvaluateConfig, SamplingConfig
from opd_jax.config_train import LoopConfig, TrainRun
from opd_jax.errors import ConfigError, DataError
from opd_jax.model.lora import Adapters
from opd_jax.stages.context import ROLES, RunContext, Split
from opd_jax.stages.watching import check_judged
from opd_jax.train.jobs import loops_of


def check_inputs(ctx: RunContext, kinds: set[str]) -> None:
    """What is wrong with a prompt file or a vocabulary is said before hours of work.

    Args:
        kinds: of the chosen stages; what only others need may be missing.
    """
    config = ctx.config
    if kinds - {"export"}:
        _check_vocabulary(ctx)
        _check_adapters(ctx)
    if kinds & {"answer", "sft"}:
        _check_enough(_fitting(ctx, "sft", config.answer), config.answer, {"sft": config.sft})
    if kinds & {"rollout", "train"}:
        runs = {f"train.runs.{name}": config.train.runs[name] for name in config.train.enabled}
        sampled = {key: run for key, run in runs.items() if run.algorithm != "sft"}
        _check_enough(_fitting(ctx, "opd", config.rollout), config.rollout, sampled)
        for name in config.train.enabled if "train" in kinds else ():
            if ctx.records.done(f"train.{name}") is None:
                check_judged(ctx, f"train.runs.{name}", config.train.runs[name])
    if "evaluate" in kinds:
        _fitting(ctx, "eval", config.evaluate)
        _check_answers(ctx)


def _fitting(ctx: RunContext, split: Split, sampling: SamplingConfig | EvaluateConfig) -> int:
    """How many prompts a split has; raises DataError if one leaves no room for its response."""
    prompts, new = ctx.encoded_prompts(split), sampling.max_new_tokens
    longest, ids = max(prompts, key=lambda prompt: len(prompt[1]))
    for role in ROLES:
        positions = ctx.program(role).arch.max_position
        if len(ids) + new > positions:
            raise DataError(
                f"{getattr(ctx.config.prompts, split)}: prompt '{longest}' has {len(ids)} tokens; "
                f"with max_new_tokens={new} that exceeds the {positions} positions of the {role}, "
                f"{ctx.path(role)}; shorten the prompt, or lower max_new_tokens"
            )
    return len(prompts)


def _check_vocabulary(ctx: RunContext) -> None:
    ctx.check_models()
    top_k, tokens = ctx.config.score.top_k, ctx.program("teacher").vocabulary
    if top_k > tokens:
        raise ConfigError(
            f"score.top_k={top_k} is more than the teacher's vocabulary of {tokens}; lower it"
        )


def _check_answers(ctx: RunContext) -> None:
    prompts = ctx.prompts("eval")
    missing = [prompt.id for prompt in prompts if prompt.answer is None]
    if missing and ctx.config.evaluate.grader != "none":
        raise DataError(
            f"{ctx.config.prompts.eval}: prompt '{missing[0]}' has no answer to grade with "
            f"({len(missing)} like it); add 'answer', or set evaluate.grader=none"
        )


def _check_adapters(ctx: RunContext) -> None:
    """Raises ConfigError if a run is to train adapters that the student or the mesh cannot have."""
    for key, loop in loops_of(ctx.config).items():
        if loop.lora is not None:
            try:
                Adapters(ctx.program("student"), loop.lora).abstract()
            except ConfigError as error:
                raise ConfigError(f"{key}.{error}") from error


def _check_enough(prompts: int, sampling: SamplingConfig, loops: Mapping[str, LoopConfig]) -> None:
    """A batch takes different records, and SFT packs several of them into a row."""
    records = prompts * sampling.samples_per_prompt
    for key, loop in loops.items():
        if isinstance(loop, TrainRun) and loop.batch_tokens is not None:
            continue
        left = records - min(loop.heldout, records // 10)
        if left < loop.batch_size:
            raise ConfigError(
                f"{key}.batch_size={loop.batch_size} is more than the {left} samples of {prompts} "
                "prompts that are not held out; lower it, or add prompts or samples_per_prompt"
            )
