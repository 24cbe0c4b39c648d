"""Where each of our parameters lies in a Hugging Face checkpoint, and how the two layouts map.

Hugging Face keeps a kernel as the matrix [out, in]; ours is [in dims..., out dims...]. Both use the
half-rotation form of RoPE, so a transpose and a reshape are all there is between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from opd_jax.model.architecture import Architecture
from opd_jax.model.transformer import LanguageModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class HFTensor:
    """A parameter's name over there, and how many of our leading dims are inputs.

    Each `{}` in the name is a leading axis of ours that stacks tensors of theirs; the first is the
    layer, the second the expert.
    """

    name: str
    in_rank: int = 0
    layers: Sequence[int] = ()
    """Numbers of the stacked layers; empty: from 0 on."""

    @property
    def stack_rank(self) -> int:
        """How many leading axes of ours stack tensors of theirs."""
        return self.name.count("{}")

    def places(self, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of theirs in a parameter of `shape`, with its leading index here."""
        for place in np.ndindex(shape[: self.stack_rank]):
            yield self.name_at(place), place

    def name_at(self, place: tuple[int, ...]) -> str:
        """Name of the tensor at a leading index here."""
        numbers = (self.layers[place[0]], *place[1:]) if self.layers and place else place
        return self.name.format(*numbers)

    def hf_shape(self, shape: Shape) -> Shape:
        """Shape over there of a `shape` here without its stacked axes."""
        if not self.in_rank:
            return shape if self.name in (EMBEDDING, HEAD) else (math.prod(shape),)
        return math.prod(shape[self.in_rank :]), math.prod(shape[: self.in_rank])

    def from_hf(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """A view of a tensor from there in our layout."""
        return (array.T if self.in_rank else array).reshape(shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """One layer's array in their layout."""
        out, inner = self.hf_shape(array.shape)[0], self.hf_shape(array.shape)[1:]
        return array.reshape(*inner, out).T if self.in_rank else array.reshape(out, *inner)


EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_LAYER = "model.layers.{}."
TENSORS: dict[str, HFTensor] = {
    "embed": HFTensor(EMBEDDING),
    "final_norm": HFTensor("model.norm.weight"),
    "head": HFTensor(HEAD),
    "layers.attn_norm": HFTensor(_LAYER + "input_layernorm.weight"),
    "layers.wq": HFTensor(_LAYER + "self_attn.q_proj.weight", 1),
    "layers.wk": HFTensor(_LAYER + "self_attn.k_proj.weight", 1),
    "layers.wv": HFTensor(_LAYER + "self_attn.v_proj.weight", 1),
    "layers.wo": HFTensor(_LAYER + "self_attn.o_proj.weight", 2),
    "layers.bq": HFTensor(_LAYER + "self_attn.q_proj.bias"),
    "layers.bk": HFTensor(_LAYER + "self_attn.k_proj.bias"),
    "layers.bv": HFTensor(_LAYER + "self_attn.v_proj.bias"),
    "layers.q_norm": HFTensor(_LAYER + "self_attn.q_norm.weight"),
    "layers.k_norm": HFTensor(_LAYER + "self_attn.k_norm.weight"),
    "layers.mlp_norm": HFTensor(_LAYER + "post_attention_layernorm.weight"),
    "dense.w_gate": HFTensor(_LAYER + "mlp.gate_proj.weight", 1),
    "dense.w_up": HFTensor(_LAYER + "mlp.up_proj.weight", 1),
    "dense.w_down": HFTensor(_LAYER + "mlp.down_proj.weight", 1),
    "moe.router": HFTensor(_LAYER + "mlp.gate.weight", 1),
    "moe.w_gate": HFTensor(_LAYER + "mlp.experts.{}.gate_proj.weight", 1),
    "moe.w_up": HFTensor(_LAYER + "mlp.experts.{}.up_proj.weight", 1),
    "moe.w_down": HFTensor(_LAYER + "mlp.experts.{}.down_proj.weight", 1),
}


def tensor_of(path: jax.tree_util.KeyPath[Any], arch: Architecture) -> HFTensor:
    """The entry of a parameter by its `jax.tree_util` key path."""
    stacks = {"dense": arch.dense_layers, "moe": arch.sparse_layers}
    layers = stacks.get(path[0].key, range(arch.num_layers))
    return replace(TENSORS[".".join(key.key for key in path)], layers=layers)


def expected_shapes(model: LanguageModel) -> dict[str, Shape]:
    """Name and shape of every tensor in a checkpoint of this model, in the order of our tree."""
    shapes: dict[str, Shape] = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(model.abstract()):
        tensor = tensor_of(path, model.arch)
        hf_shape = tensor.hf_shape(spec.shape[tensor.stack_rank :])
        shapes |= {name: hf_shape for name, _ in tensor.places(spec.shape)}
    return shapes
