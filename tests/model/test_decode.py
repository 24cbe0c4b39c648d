import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model.decode import decode, empty_cache, insert_rows, split_layers
from tests.sampling.reference import random_params, tiny_model


def test_decode_and_prefill_together_are_the_whole_forward():
    model = tiny_model("qwen3")
    params = random_params(model)
    tokens_bt = np.random.default_rng(0).integers(0, 28, (3, 12)).astype(np.int32)
    position_bt = jnp.broadcast_to(jnp.arange(12)[None], (3, 12))
    forward = jax.jit(lambda tokens: model.forward(params, tokens, position_bt))
    whole = forward(tokens_bt)
    rows, lengths = jnp.array([2, 9, 0]), jnp.array([7, 4, 5])  # the second row is dropped
    cache = insert_rows(empty_cache(model, 4, 12), (whole.keys, whole.values), rows, lengths)
    assert cache.lengths_b.tolist() == [5, 0, 7, 0]
    step = jax.jit(lambda tokens, cache: decode(model, split_layers(model, params), tokens, cache))
    for i in range(4):
        tokens_b = jnp.array([tokens_bt[2, 5 + i], 0, tokens_bt[0, 7 + i], 0])
        hidden_bd, cache = step(tokens_b, cache)
        np.testing.assert_allclose(hidden_bd[0], whole.hidden_btd[2, 5 + i], atol=1e-5)
        np.testing.assert_allclose(hidden_bd[2], whole.hidden_btd[0, 7 + i], atol=1e-5)


def test_decoding_in_place_copies_no_cache():
    model = tiny_model()
    params = split_layers(model, random_params(model))

    def loop(cache):
        def body(carry):
            i, cache = carry
            return i + 1, decode(model, params, jnp.zeros(3, jnp.int32), cache)[1]

        return jax.lax.while_loop(lambda carry: carry[0] < 8, body, (0, cache))[1]

    program = jax.jit(loop, donate_argnums=0).lower(empty_cache(model, 3, 24)).compile()
    shape = "f32[3,2,24,8]"
    copies = [line for line in program.as_text().splitlines() if f"= {shape}" in line]
    assert copies
    assert not [line for line in copies if " copy(" in line]
