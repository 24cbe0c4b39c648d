"""The blocks of the config about training: loops, optimizer, adapters, runs, guard, refresh."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from opd_jax.config_base import Frozen

RESERVED_NAMES = ("base", "sft", "teacher")
"""Checkpoint names that no training run can take."""


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
    offload: bool = False
    """Keep moments and average in the host's memory. A step brings them to the device after its
    gradients, one parameter's at a time. On CPUs both memories are one."""


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
    """Packed rows per forward pass, at least one for each device; gradients are accumulated.
    `None`: the whole batch at once."""
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
        if self.stop_when_saturated and not self.heldout:
            raise ValueError(
                "stop_when_saturated needs held-out answers, and heldout is 0; raise it, or leave "
                "that key out"
            )
        return self


class GuardConfig(Frozen):
    """What a run watches at its evaluations, and what it does when the student leaves its rollouts.

    The limits are about held-out rollouts; docs/method.md says where they come from.
    """

    action: Literal["off", "warn", "stop"] = "warn"
    """`stop` ends the run after `patience` evaluations with a warning, with its best state."""
    patience: int = Field(default=2, ge=1)
    w_std: float = Field(default=0.5, gt=0)
    """Largest standard deviation of w = pi_theta / pi_ref over tokens."""
    token_log_w: float = Field(default=-0.12, lt=0)
    """Least mean over responses of log W / tokens, W being the product of their tokens' w."""
    fresh: int = Field(default=32, ge=0)
    """Held-out prompts that the student answers anew at every evaluation; 0: none."""
    teacher: bool = False
    """Load the teacher and take the reverse KL of the fresh samples, which decides."""
    final: Literal["last", "best"] = "last"
    """Which state is the trained model, where the guard did not stop the run."""


class RefreshConfig(Frozen):
    """When a run's current student draws new rollouts, which the teacher scores, to go on from."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two rounds; `None`: on drift alone."""
    on_drift: bool = False
    """Also at an evaluation with a warning of the guard."""
    rounds: int | None = Field(default=None, ge=1)
    """At most so many; `None`: no limit."""

    @model_validator(mode="after")
    def _some_time(self) -> RefreshConfig:
        if self.every is None and not self.on_drift:
            raise ValueError("every is not given and on_drift is false; set one, or leave it out")
        return self


NOT_OF_SFT = (
    *("objective", "support", "tail", "tau", "average", "row_tokens", "weight_cap", "guard"),
    *("position_gamma", "kl_anchor", "heldout"),
)
"""Options of a run that the control does not have: its rows, and those kept out, are `sft`'s."""


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
    refresh: RefreshConfig | None = None
    """`lightning_opd`: sample and score anew on the way; `None`: never."""

    @property
    def draws(self) -> bool:
        """Whether it samples while it trains, and asks the teacher."""
        return self.algorithm == "opd" or self.refresh is not None

    @model_validator(mode="after")
    def _rounds_can_be_planned(self) -> TrainRun:
        if self.refresh is None:
            return self
        if self.batch_tokens is not None:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} leaves open how many responses a round of "
                "refresh has to draw; leave one of the two out"
            )
        if self.refresh.on_drift and self.guard.action == "off":
            raise ValueError("guard.action is 'off', and refresh.on_drift waits for its warnings")
        if self.refresh.on_drift and not self.heldout:
            raise ValueError("heldout is 0, and refresh.on_drift sees drift on what is held out")
        return self

    @model_validator(mode="after")
    def _keys_fit_the_algorithm(self) -> TrainRun:
        if self.algorithm == "sft":
            _whole_micro_batches(self)
            for key in NOT_OF_SFT:
                if getattr(self, key) != TrainRun.model_fields[key].default:
                    raise ValueError(f"{key} is no option of algorithm 'sft'; leave it out")
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
            ("refresh", self.refresh, None, ("algorithm", "lightning_opd")),
            ("steps_per_batch", self.steps_per_batch, 1, ("algorithm", "opd")),
            ("ratio_clip", self.ratio_clip, None, ("algorithm", "opd")),
            ("ratio_clip", self.ratio_clip, None, ("objective", "sampled")),
            ("reward_scale", self.reward_scale, 1.0, ("objective", "sampled")),
            # Online l_R is the current student's: neither would refer to the student after SFT.
            ("reward_scale", self.reward_scale, 1.0, ("algorithm", "lightning_opd")),
            ("kl_anchor", self.kl_anchor, 0.0, ("algorithm", "lightning_opd")),
            ("support", self.support, None, ("objective", "topk")),
            ("tail", self.tail, False, ("objective", "topk")),
        ]


class TrainConfig(Frozen):
    """Named training runs, and which of them to do."""

    runs: dict[str, TrainRun] = Field(default={"opd": TrainRun()})
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
