"""Weights and architecture of a GGUF file, seen as a Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_jax.core.gguf_file import metadata, open_gguf
from opd_jax.errors import ModelError
from opd_jax.model.architecture import Architecture
from opd_jax.model.gguf_variants import DIVISORS, expert_fields, family_of, rope_scaling
from opd_jax.model.hf_import import assemble
from opd_jax.model.hf_tensors import Shape
from opd_jax.model.transformer import LanguageModel, Params

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

STORED_AS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


def read_gguf_architecture(path: str | Path) -> Architecture:
    """The architecture in a GGUF file's metadata.

    Raises:
        ModelError: no readable GGUF file, an unknown family, or a feature that is not supported.
    """
    reader = open_gguf(path)
    family, prefix = family_of(reader, path)
    _refuse_unsupported(reader, prefix, path)
    shapes = {tensor.name: _shape(tensor) for tensor in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{path}: tensor 'token_embd.weight' is missing; copy the file again")
    heads = _number(reader, f"{prefix}.attention.head_count", path)
    width = _number(reader, f"{prefix}.embedding_length", path)
    arch = Architecture(
        family=family,
        vocab_size=shapes["token_embd.weight"][0],
        embed_dim=width,
        ffn_dim=_number(reader, f"{prefix}.feed_forward_length", path),
        num_layers=_number(reader, f"{prefix}.block_count", path),
        num_heads=heads,
        num_kv_heads=_number(reader, f"{prefix}.attention.head_count_kv", path, heads),
        head_dim=_number(reader, f"{prefix}.attention.key_length", path, width // heads),
        rope_theta=_real(reader, f"{prefix}.rope.freq_base", 10000.0),
        norm_eps=_real(reader, f"{prefix}.attention.layer_norm_rms_epsilon", 1e-6),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        max_position=_number(reader, f"{prefix}.context_length", path, 2048),
        **(expert_fields(reader, prefix, path) if family == "qwen3_moe" else {}),
    )
    return replace(arch, rope_scaling=rope_scaling(reader, prefix, arch, path))


def load_gguf_params(path: str | Path, model: LanguageModel, dtype: str = "float32") -> Params:
    """Parameters of a GGUF file, dequantised, on the model's mesh.

    Raises:
        ModelError: a tensor is missing, unknown, mis-shaped, or of a quantisation that is not read.
    """
    return assemble(GGUFSource(path, model.arch), model, dtype)


class GGUFSource:
    """A GGUF file's tensors under their Hugging Face names and in that layout."""

    def __init__(self, path: str | Path, arch: Architecture) -> None:
        self._path, self._arch = path, arch
        # Name there -> tensor here, and of which expert.
        self._tensors: dict[str, tuple[ReaderTensor, int | None]] = {}
        for tensor in open_gguf(path).tensors:
            if tensor.name != DIVISORS:  # read with the architecture
                self._tensors |= _named(tensor)

    def shapes(self) -> dict[str, Shape]:
        """Every tensor in the file; raises ModelError for a quantisation that is not read."""
        for tensor, _ in self._tensors.values():
            if tensor.tensor_type.name not in STORED_AS:
                raise ModelError(
                    f"{self._path}: tensor '{tensor.name}' is stored as {tensor.tensor_type.name}; "
                    f"only {', '.join(STORED_AS)} are read"
                )
        return {
            name: _shape(tensor)[0 if expert is None else 1 :]
            for name, (tensor, expert) in self._tensors.items()
        }

    def file_of(self, name: str) -> str:
        """The file, and the tensor's name in it where that is known."""
        found = self._tensors.get(name)
        return str(self._path) if found is None else f"{self._path} ({found[0].name})"

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of one tensor, float32."""
        from gguf.quants import dequantize

        tensor, expert = self._tensors[name]
        shape = _shape(tensor)
        if expert is not None:  # one expert after the other: as many rows more
            start, stop = (expert * shape[1] + row for row in (start, stop))
            shape = (shape[0] * shape[1], shape[2])
        # Mapped anew for these rows: pages that stay mapped count as this process's memory.
        layout = (shape[0], int(tensor.n_bytes) // shape[0])
        stored = np.memmap(self._path, np.uint8, "r", int(tensor.data_offset), layout)
        rows = np.asarray(stored[self._stored_rows(name, shape[0], start, stop)])
        # As one long row: `dequantize` handles rows in Python, sixteen at a time.
        return dequantize(rows.reshape(1, -1), tensor.tensor_type).reshape(-1, *shape[1:])

    def _stored_rows(self, name: str, rows: int, start: int, stop: int) -> slice | np.ndarray:
        """Where rows `start` to `stop` lie in the file."""
        heads = {"q_proj.weight": self._arch.num_heads, "k_proj.weight": self._arch.num_kv_heads}
        kind = ".".join(name.split(".")[-2:])
        if self._arch.family != "llama" or kind not in heads:
            return slice(start, stop)
        # llama.cpp stores Llama's query and key rows in pairs; half-rotation has them in halves.
        paired = np.arange(rows).reshape(heads[kind], -1, 2)
        return paired.swapaxes(1, 2).ravel()[start:stop]


def _named(tensor: ReaderTensor) -> dict[str, tuple[ReaderTensor, int | None]]:
    """A tensor by its Hugging Face name; one that stacks experts by the names of all of them."""
    parts = tensor.name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _EXPERTS:
        prefix = f"model.layers.{parts[1]}.mlp.experts."
        kind = _EXPERTS[parts[2]]
        count = _shape(tensor)[0]
        return {f"{prefix}{e}.{kind}.{parts[3]}": (tensor, e) for e in range(count)}
    return {_hf_name(tensor.name): (tensor, None)}


def _hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one keeps its own and is refused later."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
    return name


def _shape(tensor: ReaderTensor) -> Shape:
    """GGUF lists dimensions fastest first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _number(reader: GGUFReader, key: str, path: str | Path, default: int | None = None) -> int:
    value = metadata(reader, key, default)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{path}: metadata {key}={value!r} is not a positive integer")
    return value


def _real(reader: GGUFReader, key: str, default: float) -> float:
    """Stored as float32: the shortest decimal that is the same float32 is what the author wrote."""
    return float(str(np.float32(metadata(reader, key, default))))


def _refuse_unsupported(reader: GGUFReader, family: str, path: str | Path) -> None:
    allowed: dict[str, tuple[Any, ...]] = {
        f"{family}.attention.sliding_window": (None, 0),
        f"{family}.attention.value_length": (
            None,
            metadata(reader, f"{family}.attention.key_length"),
        ),
    }
    for key, values in allowed.items():
        if metadata(reader, key) not in values:
            raise ModelError(f"{path}: {key}={metadata(reader, key)!r} is not supported")
