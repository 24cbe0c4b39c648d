"""The rollout engine: prefill, decode, slot refill, sampling transforms.

The names below are for use outside of a run; within `opd_jax`, modules are imported by themselves.
"""

from opd_jax.sampling.api import Sampler
from opd_jax.sampling.slots import Sample
from opd_jax.sampling.text_stream import TextStream

__all__ = ["Sample", "Sampler", "TextStream"]
