"""A config on devices that are absent: its models, its mesh, and how much there is to do.

Lengths are the longest that the config allows, so what fits here fits every run of the config.
Weights, tokenizers and prompts need not be there: sizes come from each model's `config.json`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from opd_jax.config import Config, MeshConfig, SamplingConfig
from opd_jax.core.gguf_file import is_gguf
from opd_jax.core.mesh import axis_size
from opd_jax.data.prompts import load_prompts
from opd_jax.data.tokenizer import Tokenizer, load_tokenizer
from opd_jax.fit.targets import Target, parse_target
from opd_jax.fit.topology import devices_of
from opd_jax.model.load import architecture_of, padding_start
from opd_jax.model.transformer import LanguageModel
from opd_jax.train.jobs import check_row_tokens, spread_batches
from opd_jax.train.mesh_choice import mesh_of

Role = Literal["student", "teacher"]
Split = Literal["sft", "opd"]


@dataclass(frozen=True)
class Setup:
    """What all programs of a config are built from."""

    config: Config
    target: Target
    mesh: Mesh

    @property
    def ways(self) -> int:
        """Into how many parts the mesh cuts the rows of a batch."""
        return axis_size(self.mesh, "batch")

    @property
    def store_dtype(self) -> str:
        """In which models lie in memory when they do not train."""
        return self.config.model.param_dtype

    def path(self, role: Role) -> str:
        """The model's folder or file."""
        return self.config.model.student if role == "student" else self.config.model.teacher

    def model(self, role: Role) -> LanguageModel:
        """The program of a model; its sizes are those of `config.json`.

        Raises:
            ModelError: there is none, or it describes what is not supported.
        """
        arch, config = architecture_of(self.path(role)), self.config.model
        tokenizer = self.tokenizer(role)
        tokens = None if tokenizer is None else tokenizer.vocab_size
        # Accelerators compute in bfloat16 unless told otherwise; the process here sees a CPU.
        dtype = "bfloat16" if config.compute_dtype == "auto" else config.compute_dtype
        padded = padding_start(arch, tokens)
        return LanguageModel(arch, dtype, config.remat, self.mesh, config.attention, padded)

    def tokenizer(self, role: Role) -> Tokenizer | None:
        """The tokenizer beside a model, where there is one."""
        path = Path(self.path(role))
        there = is_gguf(path) or (path / "tokenizer.json").is_file()
        return _tokenizer(str(path)) if there else None

    def prompt_tokens(self, model: LanguageModel, sampling: SamplingConfig) -> int:
        """The longest prompt that the config and the model's positions allow."""
        room = model.arch.max_position - sampling.max_new_tokens
        return max(min(self.config.prompts.max_prompt_tokens, room), 1)

    def prompts(self, split: Split) -> int:
        """How many there are; without the file, as many as training takes, or the limit."""
        config = self.config.prompts
        path, limit = getattr(config, split), getattr(config, f"{split}_limit")
        if Path(path).is_file():
            return len(load_prompts(path, limit))
        return limit or self.taken(split)

    def taken(self, split: Split) -> int:
        """Prompts that training takes if it sees each once."""
        if split == "sft":
            return self.config.sft.steps * self.config.sft.batch_size
        runs = [self.config.train.runs[name] for name in self.config.train.enabled]
        most = max((run.steps * run.batch_size for run in runs), default=1)
        return max(most // self.config.rollout.samples_per_prompt, 1)


@functools.cache
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path, chats=False)


def open_setup(config: Config, target: str) -> Setup:
    """The config's mesh on the target's devices; from then on the config names it.

    Raises:
        ConfigError: the mesh does not fit the devices, or the batches do not fit the mesh.
    """
    mesh = mesh_of(config, devices_of(target))
    config = config.model_copy(update={"mesh": MeshConfig(**mesh.shape)})
    config, _ = spread_batches(config, axis_size(mesh, "batch"))
    check_row_tokens(config, axis_size(mesh, "time"))
    return Setup(config, parse_target(target), mesh)
