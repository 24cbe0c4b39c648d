"""Offline on-policy distillation in JAX.

Shape legend, used in names (`logprob_bt`) and in einsum terms alike:
b batch, t token (query side), s cached token (key side) or support entry, d embed, f ffn,
n query heads, k kv heads, h head dim, v vocabulary, l layer, r record, c chunk.
`mask_bt` is bool, `weight_bt` is float.
"""

__version__ = "0.1.0"
