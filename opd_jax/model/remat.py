"""What the backward pass finds of a layer, and what it computes again."""

from __future__ import annotations

from typing import Any

import jax

from opd_jax.model.attention import SAVED

SAVED_NAMES = (SAVED, "attended", "gate", "up")
LAYER_INPUT = "layer_input"


def remat(body: Any, policy: str) -> Any:
    """A layer's function, whose gradient keeps what the policy says.

    `none`: the named products; norms, activations, experts and `xla` attention are computed again.
    `dots`: the products with weights, but not attention. `full`: the layer's input. `offload`: the
    same, kept in the host's memory, from which the backward pass fetches it layer by layer.
    """
    policies = jax.checkpoint_policies
    saved = {
        "none": policies.save_only_these_names(*SAVED_NAMES),
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return jax.checkpoint(body, policy=saved[policy], prevent_cse=False)
