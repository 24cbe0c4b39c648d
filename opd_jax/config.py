"""The config tree: every key, its type, its default and its bounds. Nothing else holds a default.

`opd_jax.config_load` reads it from YAML and overrides. The validators here refuse what contradicts
itself; their messages begin with the key, as seen from their block, that has to change.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["float32", "bfloat16"]


class PathMark:
    """Marks a string as the path of an input file, so that the loader resolves it."""


PathStr = Annotated[str, PathMark(), Field(min_length=1)]

RESERVED_NAMES = ("base", "sft", "teacher")
"""Checkpoint names that no training run can take."""


class Frozen(BaseModel):
    """A config node: immutable, strict about unknown keys and about types, without infinities."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )


class MeshConfig(Frozen):
    """Devices along each mesh axis. At most one axis is -1: it takes what the others leave."""

    data: int = Field(default=1, ge=-1)
    fsdp: int = Field(default=-1, ge=-1)
    tensor: int = Field(default=1, ge=-1)
    expert: int = Field(default=1, ge=-1)
    """Experts of a mixture are spread over it, and so are batch rows."""

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
    top_k: int = Field(default=0, ge=0)
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


class OptimConfig(Frozen):
    """AdamW with warm-up and a schedule; the defaults are the paper's for offline OPD."""

    learning_rate: float = Field(default=2e-6, gt=0)
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """`wsd`: constant, then down to 0 over the last `decay_share` of all steps."""
    warmup_steps: int = Field(default=0, ge=0)
    decay_share: float = Field(default=0.2, gt=0, le=1)
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.98, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """How AdamW's two moments are kept: 8, 4 or a little over 2 bytes per trained parameter."""
    ema: float | None = Field(default=None, ge=0, lt=1)
    """Keep a moving average of the parameters, in float32, that holds on to this share of itself
    at a step. The average, not the last step's parameters, is then the trained model."""


class LoraConfig(Frozen):
    """Train low-rank additions to dense weights, and nothing else."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    """An addition is `alpha / rank` times the product of its two matrices."""
    targets: tuple[Literal["wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"], ...] | None = Field(
        default=None, strict=False, min_length=1
    )
    """`None`: all of these that the model has outside its experts."""


class LoopConfig(Frozen):
    """What every training loop has: its length, its batch and its checkpoints."""

    steps: int = Field(default=150, ge=1)
    batch_size: int = Field(default=256, ge=1)
    """Sequences per optimizer step (packed rows for SFT), over all devices."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Packed rows per forward pass; gradients are accumulated. `None`: the whole batch at once."""
    save_every: int = Field(default=50, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations; `None`: a tenth of them."""
    heldout: int = Field(default=64, ge=0)
    """Records kept out of training for the evaluations, at most a tenth of all; 0: none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradient is not finite; it never changes the parameters."""
    router_balance: float = Field(default=0.0, ge=0)
    """Coefficient of the loss that spreads tokens evenly over a mixture's experts; 0: none."""
    lora: LoraConfig | None = None
    """`None`: all parameters are trained."""
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _fits_itself(self) -> LoopConfig:
        if self.optim.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} is above "
                f"steps {self.steps}; lower it"
            )
        return self


def _whole_micro_batches(loop: LoopConfig) -> None:
    if loop.micro_batch_size is not None and loop.batch_size % loop.micro_batch_size:
        raise ValueError(
            f"micro_batch_size {loop.micro_batch_size} does not divide batch_size {loop.batch_size}"
        )


class SFTConfig(LoopConfig):
    """Supervised fine-tuning on the teacher's answers, in packed rows of `row_tokens`."""

    row_tokens: int = Field(default=16384, ge=8)
    saturation: float = Field(default=0.01, ge=0)
    """Nats a token: SFT has saturated once the student's NLL of held-out answers over the teacher's
    own varies by less for three evaluations."""
    stop_when_saturated: bool = False

    @model_validator(mode="after")
    def _rows_fill_micro_batches(self) -> SFTConfig:
        _whole_micro_batches(self)
        return self


class ScoreConfig(Frozen):
    """The teacher pass; it stores the teacher's `top_k` likeliest tokens at every position, too."""

    top_k: int = Field(default=0, ge=0, le=4096)
    entropy: bool = False
    """Store the entropy of the teacher's distribution at every position, too."""
    batch_tokens: int = Field(default=8192, ge=1)


class GuardConfig(Frozen):
    """What a run watches at its evaluations, and what it does when the student leaves its rollouts.

    The limits are about held-out rollouts; docs/results.md shows how well they tell.
    """

    action: Literal["off", "warn", "stop"] = "warn"
    """`stop` ends the run after `patience` evaluations with a warning, with its best state."""
    patience: int = Field(default=2, ge=1)
    w_std: float = Field(default=0.35, gt=0)
    """Largest standard deviation of w = pi_theta / pi_ref over tokens."""
    log_w: float = Field(default=-1.5, lt=0)
    """Least mean over responses of log W, the sum of their tokens' log w."""
    fresh: int = Field(default=32, ge=0)
    """Held-out prompts that the student answers anew at every evaluation; 0: none."""
    teacher: bool = False
    """Load the teacher and take the reverse KL of the fresh samples, which decides."""
    final: Literal["last", "best"] = "last"
    """Which state is the trained model, where the guard did not stop the run."""


class TrainRun(LoopConfig):
    """One training run from the SFT student. Its name in `train.runs` names its checkpoint."""

    algorithm: Literal["lightning_opd", "opd", "sft"] = "lightning_opd"
    """`lightning_opd`: stored rollouts and scores; `opd`: fresh rollouts, live teacher; `sft`: the
    control."""
    objective: Literal["sampled", "topk"] = "sampled"
    support: int | None = Field(default=None, ge=1)
    """Use only this many of the stored top-k (`topk`); `None`: all of them."""
    tail: bool = False
    """`topk`: one more bucket for the mass outside the support, instead of renormalising."""
    tau: float = Field(default=10.0, gt=0)
    """The advantage is clipped to [-tau, tau]."""
    average: Literal["sequence", "token"] = "sequence"
    """Mean over sequences of their tokens' mean (the paper's), or over all response tokens."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """`lightning_opd`: a step takes the sequences that have so many tokens, not `batch_size`."""
    row_tokens: int | None = Field(default=None, ge=8)
    """Length of the packed rows; `None`: as the longest record is."""
    weight_cap: float | None = Field(default=None, gt=0)
    """Tokens weigh min(pi_theta / pi_ref, weight_cap): none pushes down what is sampled no more."""
    position_gamma: float = Field(default=0.0, ge=0)
    """Tokens before the large advantages of their response weigh up to 1 + position_gamma."""
    reward_scale: float = Field(default=1.0, gt=0)
    """`sampled`: how far to go from pi_ref to the teacher; above 1: beyond it."""
    kl_anchor: float = Field(default=0.0, ge=0)
    """Coefficient of a pull back to the student after SFT."""
    steps_per_batch: int = Field(default=1, ge=1)
    """`opd`: optimizer steps on samples that are drawn at once, `batch_size` of them a step."""
    ratio_clip: float | None = Field(default=None, gt=0, lt=1)
    """`opd`, `sampled`: PPO's clipped ratio to the policy that drew the samples."""
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _keys_fit_the_algorithm(self) -> TrainRun:
        if self.algorithm == "sft":
            _whole_micro_batches(self)
        for key, value, off, needs in self._bound_keys():
            if value != off and getattr(self, needs[0]) != needs[1]:
                raise ValueError(
                    f"{key} {value} is for {needs[0]} '{needs[1]}' alone, here it is "
                    f"'{getattr(self, needs[0])}'; leave it out"
                )
        if self.save_every % self.steps_per_batch:
            raise ValueError(
                f"save_every {self.save_every} is no multiple of steps_per_batch "
                f"{self.steps_per_batch}, and only then a state can be resumed; change one"
            )
        return self

    def _bound_keys(self) -> list[tuple[str, object, object, tuple[str, str]]]:
        """(key, value, value that means off, (key it depends on, what that has to be))."""
        return [
            ("batch_tokens", self.batch_tokens, None, ("algorithm", "lightning_opd")),
            ("steps_per_batch", self.steps_per_batch, 1, ("algorithm", "opd")),
            ("ratio_clip", self.ratio_clip, None, ("algorithm", "opd")),
            ("ratio_clip", self.ratio_clip, None, ("objective", "sampled")),
            ("reward_scale", self.reward_scale, 1.0, ("objective", "sampled")),
        ]


class TrainConfig(Frozen):
    """Named training runs, and which of them to do."""

    runs: dict[str, TrainRun] = {"opd": TrainRun()}
    enabled: tuple[str, ...] = Field(default=("opd",), strict=False)

    @model_validator(mode="after")
    def _names_are_known(self) -> TrainConfig:
        for name in self.runs:
            if name in RESERVED_NAMES or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(
                    f"runs has a run named {name!r}; use letters, digits, '_' and '-', "
                    f"and none of {', '.join(RESERVED_NAMES)}"
                )
        for name in self.enabled:
            if name not in self.runs:
                raise ValueError(
                    f"enabled names {name!r}, but train.runs has {', '.join(self.runs) or 'none'}"
                )
        if len(set(self.enabled)) < len(self.enabled):
            raise ValueError(f"enabled names a run twice: {', '.join(self.enabled)}")
        return self


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
    mesh: MeshConfig = MeshConfig()
    answer: SamplingConfig = SamplingConfig()
    sft: SFTConfig = SFTConfig()
    rollout: SamplingConfig = SamplingConfig()
    score: ScoreConfig = ScoreConfig()
    teacher: TeacherConfig = TeacherConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    flush_seconds: float = Field(default=20.0, ge=0)
    """Sampling and scoring commit what they have this often: at most so much is lost to a kill."""
    tensorboard: bool = False

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
