import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import filled

from opd_jax.model.cache import Pages, PromptPages, empty_cache, page_table
from opd_jax.model.decode import FEW_ROWS, GROUPS, decode, product, split_layers
from tests.sampling.reference import random_params, tiny_model

PAGES = Pages((4, 3, 2), 5)


def test_decode_and_prefill_together_are_the_whole_forward():
    model = tiny_model("qwen3")
    params = random_params(model)
    tokens_bt = np.random.default_rng(0).integers(0, 28, (3, 12)).astype(np.int32)
    position_bt = jnp.broadcast_to(jnp.arange(12)[None], (3, 12))
    forward = jax.jit(lambda tokens: model.forward(params, tokens, position_bt))
    whole = forward(tokens_bt)
    rows, lengths = jnp.array([2, 9, 0]), jnp.array([7, 4, 5])  # the second row is dropped
    cache, table = filled(model, PAGES, (whole.keys, whole.values), rows, lengths, 12)
    assert cache.lengths_b.tolist() == [5, 0, 7, 0]
    split = split_layers(model, params)
    step = jax.jit(lambda tokens, cache: decode(model, PAGES, split, tokens, cache, table))
    for i in range(4):
        tokens_b = jnp.array([tokens_bt[2, 5 + i], 0, tokens_bt[0, 7 + i], 0])
        hidden_bd, cache = step(tokens_b, cache)
        np.testing.assert_allclose(hidden_bd[0], whole.hidden_btd[2, 5 + i], atol=1e-5)
        np.testing.assert_allclose(hidden_bd[2], whole.hidden_btd[0, 7 + i], atol=1e-5)


@pytest.mark.parametrize(
    "pages",
    [Pages((3, 1), 24), Pages((1,), 24), Pages((3, 1), 24, prompts=PromptPages(2, 2, 40))],
    ids=str,
)
def test_decoding_in_place_copies_no_cache(pages):
    model = tiny_model()
    params = split_layers(model, random_params(model))
    table = page_table(pages, lambda shape: jnp.zeros(shape, jnp.int32))
    tokens_b = jnp.zeros(pages.rows, jnp.int32)

    def loop(cache):
        def body(carry):
            i, cache = carry
            cache = decode(model, pages, params, tokens_b, cache, table)[1]
            return i + 1, cache

        return jax.lax.while_loop(lambda carry: carry[0] < 8, body, (0, cache))[1]

    program = jax.jit(loop, donate_argnums=0).lower(empty_cache(model, pages)).compile()
    shapes = [f"f32[{n},2,{x}]" for n, t in pages.arrays for x in (f"{t},8", f"8,{t}")]
    for shape in shapes:
        lines = [line for line in program.as_text().splitlines() if f"= {shape}" in line]
        assert lines
        assert not [line for line in lines if " copy(" in line]


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("outputs", [(3 * GROUPS,), (3, 5)], ids=str)
def test_products_of_any_number_of_rows_are_those_of_einsum(rows, outputs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 1, 2, 8)).astype(np.float32)
    weight = rng.normal(size=(*outputs, 2, 8)).astype(np.float32)
    wanted = np.tensordot(x, weight, axes=((2, 3), (-2, -1)))
    np.testing.assert_allclose(product(None, x, jnp.asarray(weight), 2), wanted, atol=1e-5)
