"""One entry for every kind of model path."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh

from opd_jax.core.gguf_file import is_gguf
from opd_jax.errors import ConfigError
from opd_jax.model.architecture import Architecture
from opd_jax.model.gguf import load_gguf_params, read_gguf_architecture
from opd_jax.model.hf_config import read_architecture
from opd_jax.model.hf_import import load_params
from opd_jax.model.transformer import LanguageModel, Params


def architecture_of(path: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder or a .gguf file; raises ModelError."""
    return read_gguf_architecture(path) if is_gguf(path) else read_architecture(path)


def resolve_dtype(wanted: str) -> str:
    """A compute dtype; `auto` is bfloat16 on accelerators, float32 on CPU.

    Raises:
        ConfigError: it is none of these.
    """
    if wanted not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"compute_dtype={wanted!r}; give auto, float32 or bfloat16")
    if wanted != "auto":
        return wanted
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def padding_start(arch: Architecture, tokens: int | None) -> int | None:
    """The first row of a vocabulary that a tokenizer of so many tokens does not use, if any."""
    return None if tokens is None or tokens >= arch.vocab_size else tokens


def read_model(
    path: str | Path,
    param_dtype: str = "float32",
    compute_dtype: str = "float32",
    remat: str = "none",
    mesh: Mesh | None = None,
    attention: str = "auto",
    tokens: int | None = None,
) -> tuple[LanguageModel, Params]:
    """A model and its parameters from a Hugging Face folder or a .gguf file.

    Args:
        tokens: of its tokenizer; what the vocabulary has beyond them is padding.

    Raises:
        ModelError: the path is missing, damaged, or holds what is not supported.
        ConfigError: the mesh does not divide a parameter.
    """
    arch = architecture_of(path)
    padded_from = padding_start(arch, tokens)
    model = LanguageModel(arch, compute_dtype, remat, mesh, attention, padded_from)
    load = load_gguf_params if is_gguf(path) else load_params
    return model, load(path, model, param_dtype)
