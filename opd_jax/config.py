"""The config tree: every key, its type, its default and its bounds. Nothing else holds a default.

`opd_jax.config_load` reads it from YAML and overrides. The validators here refuse what contradicts
itself; their messages begin with the key, as seen from their block, that has to change.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from opd_jax.config_base import Frozen, PathStr
from opd_jax.config_train import SFTConfig, TrainConfig

Dtype = Literal["float32", "bfloat16"]


class MeshConfig(Frozen):
    """Devices along each mesh axis. At most one axis is -1: it takes what the others leave."""

    data: int = Field(default=1, ge=-1)
    fsdp: int = Field(default=-1, ge=-1)
    tensor: int = Field(default=1, ge=-1)
    expert: int = Field(default=1, ge=-1)
    """Experts of a mixture are spread over it, and so are batch rows."""
    context: int = Field(default=1, ge=-1)
    """The tokens of every row are cut over it: for rows too long for the devices' memory, or fewer
    than the devices. Where there are rows enough for all devices, `fsdp` sends less."""

    @model_validator(mode="after")
    def _one_free_axis(self) -> MeshConfig:
        sizes = self.model_dump()
        if zero := [axis for axis, size in sizes.items() if size == 0]:
            raise ValueError(f"{zero[0]} is 0; give a number of devices, or -1 for the rest")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ValueError(f"{' and '.join(free)} are -1; at most one axis can take the rest")
        return self


class ModelConfig(Frozen):
    """Where the models are, and in which precision they compute."""

    student: PathStr
    teacher: PathStr
    param_dtype: Dtype = "float32"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on accelerators, float32 on CPU."""
    remat: Literal["none", "dots", "full", "offload"] = "none"
    attention: Literal["auto", "xla", "chunked", "splash", "triton"] = "auto"
    """`auto`: what fits platform and shape; see `opd_jax.model.attention_choice`."""


class PromptsConfig(Frozen):
    """JSON-lines files of prompts: `{"id", "prompt" or "messages", "answer"?}` per line."""

    sft: PathStr
    opd: PathStr
    eval: PathStr
    sft_limit: int | None = Field(default=None, ge=1)
    opd_limit: int | None = Field(default=None, ge=1)
    eval_limit: int | None = Field(default=None, ge=1)
    system: str | None = None
    enable_thinking: bool = True
    max_prompt_tokens: int = Field(default=1024, ge=1)


class SamplingConfig(Frozen):
    """How a response is drawn.

    `top_k=0`, `top_p=1`, `min_p=0` switch a transform off; `temperature=0` is greedy.
    """

    temperature: float = Field(default=1.0, ge=0)
    top_k: int = Field(default=0, ge=0, le=2**31 - 1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    max_new_tokens: int = Field(default=4096, ge=1)
    min_new_tokens: int = Field(default=0, ge=0)
    """No end token and no stop string ends a response before it has this many tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), strict=False)
    """A response ends with the token that completes one of these texts."""
    samples_per_prompt: int = Field(default=1, ge=1)
    slots: int = Field(default=32, ge=1)
    """Samples in flight at once."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> SamplingConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is above "
                f"max_new_tokens {self.max_new_tokens}; lower it"
            )
        return self


class ScoreConfig(Frozen):
    """The teacher pass; it stores the teacher's `top_k` likeliest tokens at every position, too."""

    top_k: int = Field(default=0, ge=0, le=4096)
    entropy: bool = False
    """Store the entropy of the teacher's distribution at every position, too."""
    batch_tokens: int = Field(default=8192, ge=1)


class TeacherConfig(Frozen):
    """The consistency check."""

    allow_mismatch: bool = False


class EvaluateConfig(Frozen):
    """Fresh samples at temperature 1 (accuracy, reverse KL) and greedy answers of checkpoints."""

    grader: Literal["none", "exact", "math"] = "exact"
    greedy: bool = True
    max_new_tokens: int = Field(default=4096, ge=1)
    slots: int = Field(default=32, ge=1)
    samples_per_prompt: int = Field(default=1, ge=1)
    teacher: bool = True
    """Also evaluate the teacher itself."""
    base: bool = True
    """Also evaluate the base student."""


class Config(Frozen):
    """A whole run."""

    run_dir: Annotated[str, Field(min_length=1)]
    store: Annotated[str, Field(min_length=1)] | None = None
    """A folder, or a `gs://` or `s3://` address, for all token stores; `None`: `run_dir`."""
    seed: int = Field(default=0, ge=0)
    model: ModelConfig
    prompts: PromptsConfig
    mesh: MeshConfig | None = None
    """`None`: chosen for the devices, the models and the batches."""
    answer: SamplingConfig = SamplingConfig()
    sft: SFTConfig = SFTConfig()
    rollout: SamplingConfig = SamplingConfig()
    score: ScoreConfig = ScoreConfig()
    teacher: TeacherConfig = TeacherConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    flush_seconds: float = Field(default=20.0, ge=0)
    """Sampling and scoring commit what they have this often: at most so much is lost to a kill."""
    compile_cache: Annotated[str, Field(min_length=1)] | None = "auto"
    """A folder to keep compiled programs in; `auto`: one in the user's cache; `None`: nowhere."""
    tensorboard: bool = False
    """TensorBoard files beside `metrics.jsonl`."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """A project of Weights & Biases to send the metrics to as well."""

    @model_validator(mode="after")
    def _supports_are_stored(self) -> Config:
        for name in self.train.enabled:
            run, stored = self.train.runs[name], self.score.top_k
            if run.algorithm == "sft" or run.objective != "topk":
                continue
            if stored == 0:
                raise ValueError(
                    f"train.runs.{name}.objective is 'topk', but score.top_k is 0; "
                    "set score.top_k to the number of teacher tokens to store"
                )
            if run.support is not None and run.support > stored:
                raise ValueError(
                    f"train.runs.{name}.support {run.support} is above score.top_k {stored}; "
                    "lower it or store more"
                )
        return self
