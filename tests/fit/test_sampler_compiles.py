"""The sampler's programs compile for absent devices; a decode step sends no weight.

On a mesh with `fsdp`, `tensor` and `data` or `expert` of 2, and pages on two levels; `shared` has
pages for prompts too.
"""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "case"),
    [("v5e:2x4", "shared"), ("h100:8", "shared"), ("v5e:2x4", "experts"), ("h100:8", "experts")],
)
def test_decoding_sends_activations_alone_and_keeps_its_cache_in_place_on(compiled, target, case):
    found = compiled("compile_sampler.py", target, case)
    assert found["devices"] == 8
    largest = max(found["collectives"], key=lambda x: x["bytes"])
    print(f"{len(found['collectives'])} collectives; the largest {largest}; {found['programs']}")
    assert {x["kind"] for x in found["collectives"]} >= {"all-reduce", "all-to-all"}
    # Of all slots, float32: less than a sixth of a device's part of the smallest matrix.
    assert largest["bytes"] <= max(found["hidden_bytes"], found["noise_bytes"]), largest
    for name in ("start", "decode"):
        kept = found["programs"][name]["alias_bytes"]  # the cache, a device's part, and little more
        assert found["cache_bytes"] <= kept < 1.1 * found["cache_bytes"], name
    # Weights that are gathered before the loop would lie there: the head alone is 150 MB.
    assert found["programs"]["decode"]["temp_bytes"] < found["cache_bytes"]
