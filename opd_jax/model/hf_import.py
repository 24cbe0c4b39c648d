"""Weights of a Hugging Face checkpoint as our parameters, checked tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from opd_jax.errors import ModelError
from opd_jax.model.hf_tensors import EMBEDDING, HEAD, Shape, expected_shapes, tensor_of
from opd_jax.model.safetensors_files import SafetensorsSource
from opd_jax.model.streaming import TensorSource, read_parameter
from opd_jax.model.transformer import LanguageModel, Params


def load_params(folder: str | Path, model: LanguageModel, dtype: str = "float32") -> Params:
    """Parameters of a Hugging Face folder, on the model's mesh.

    Raises:
        ModelError: a file is missing or damaged, or a tensor is missing, unknown or mis-shaped.
        ConfigError: the mesh does not divide a parameter.
    """
    return assemble(SafetensorsSource(Path(folder)), model, dtype)


def assemble(source: TensorSource, model: LanguageModel, dtype: str) -> Params:
    """Stack a checkpoint's tensors into parameters; `streaming` says what it costs in memory."""
    check_tensors(source, model)
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: read_parameter(source, tensor_of(path, model.arch), spec),
        model.abstract(dtype),
    )


def check_tensors(source: TensorSource, model: LanguageModel) -> None:
    """Raises ModelError unless the checkpoint has the model's tensors and no others."""
    expected, found = expected_shapes(model), source.shapes()
    arch = model.arch
    for name, shape in expected.items():
        if name not in found:
            raise ModelError(
                f"{source.file_of(name)}: tensor '{name}' {list(shape)} is missing: no tensor of "
                "any shape has that name; copy the model again, or correct the config"
            )
        if found[name] != shape:
            raise ModelError(
                f"{source.file_of(name)}: tensor '{name}' has shape {list(found[name])}, "
                f"the config asks for {list(shape)}; correct the config, or copy the model again"
            )
    extra = [name for name in found if name not in expected and not _is_buffer(name)]
    if arch.tie_embeddings and HEAD in extra:
        _check_tied(source, found)
        extra.remove(HEAD)
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise ModelError(
            f"{source.file_of(extra[0])}: tensor '{extra[0]}' {list(found[extra[0]])}{more} is no "
            f"part of a {arch.family} model of {arch.num_layers} layers, whose config asks for no "
            "shape there; correct the config, or copy the model again"
        )


def _is_buffer(name: str) -> bool:
    """Old checkpoints store RoPE frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _check_tied(source: TensorSource, found: dict[str, Shape]) -> None:
    if found[HEAD] != found[EMBEDDING] or not _same_rows(source, found[HEAD][0]):
        raise ModelError(
            f"{source.file_of(HEAD)}: '{HEAD}' {list(found[HEAD])} differs from '{EMBEDDING}' "
            f"{list(found[EMBEDDING])}, but the config says tie_word_embeddings=true: set it false"
        )


def _same_rows(source: TensorSource, rows: int, step: int = 256) -> bool:
    return all(
        np.array_equal(
            source.read(HEAD, start, min(start + step, rows)),
            source.read(EMBEDDING, start, min(start + step, rows)),
        )
        for start in range(0, rows, step)
    )
