"""The sampler's programs compile for absent devices; a decode step sends no weight.

On a mesh with `fsdp`, `tensor` and `data` or `expert` of 2, and a second page for every other slot.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from opd_jax.fit.topology import environment

SCRIPT = Path(__file__).with_name("compile_sampler.py")


def of_logits(dims, found):
    """Some of the vocabulary's parts, for no more than all slots: far less than the head."""
    return max(dims, default=0) * 8 >= found["vocabulary"] and math.prod(dims) <= (
        found["slots"] * found["vocabulary"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense", "experts"])
@pytest.mark.parametrize("target", ["v5e:2x4", "h100:8"])
def test_decoding_sends_activations_alone_and_keeps_its_cache_in_place_on(target, case):
    command = [sys.executable, str(SCRIPT), target, case]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    sent = sorted(found["collectives"], key=lambda x: -x["bytes"])
    rest = [x for x in sent if not of_logits(x["dims"], found)]
    print(f"{len(sent)} collectives; the largest {sent[0]}, without logits {rest[0]}")
    print(found["programs"])
    assert {x["kind"] for x in sent} >= {"all-reduce", "all-to-all"}
    # Hidden states of all slots, float32: a sixteenth of a device's part of the smallest matrix.
    assert rest[0]["bytes"] <= found["hidden_bytes"], rest[0]
    for name in ("start", "decode"):
        assert found["programs"][name]["alias_bytes"] >= found["cache_bytes"], name
    # Weights that are gathered before the loop would lie there: the head alone is 150 MB.
    logits_bytes = 4 * found["slots"] * found["vocabulary"]
    assert found["programs"]["decode"]["temp_bytes"] < 2 * logits_bytes
