"""Several TPU slices: what the compiled train step sends between them."""

import pytest


@pytest.mark.slow
def test_copies_of_the_weights_in_one_slice_add_up_the_embedding_s_gradient_in_shards(compiled):
    """It was added up whole over all devices; of large batches all rows were gathered."""
    found = compiled("compile_slices.py", "v5e:2x4", "2", "4")
    sent = {(x["kind"], x["axes"]): x["sent_bytes"] for x in found["sent"]}
    assert sent["all-reduce", "data"] > 0.5 * found["parameters"]
    assert sent.get(("all-reduce", "data+fsdp"), 0.0) < 0.01 * found["parameters"]


@pytest.mark.slow
def test_only_data_crosses_the_network_and_mostly_gradients_do(compiled):
    """Beside the gradients, what is scattered into the head's: the vectors of the targets."""
    found = compiled("compile_slices.py", "2xv5e:2x2", "2", "4")
    assert found["islands"] == [0] * 4 + [1] * 4
    crossing = [x for x in found["sent"] if x["network_bytes"]]
    assert {x["axes"] for x in crossing} == {"data"}
    assert all(x["network_bytes"] == x["sent_bytes"] for x in crossing)
    assert {x["axes"] for x in found["sent"] if not x["network_bytes"]} == {"fsdp"}
    sent = {x["kind"]: x["sent_bytes"] for x in crossing}
    # Layers' gradients in bfloat16, those of the embedding, and of it as a head, in float32.
    assert 0.5 * found["parameters"] < sent["all-reduce"] < 1.5 * found["parameters"]
    assert sum(sent.values()) - sent["all-reduce"] < 0.5 * sent["all-reduce"]
