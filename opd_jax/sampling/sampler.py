"""Sample responses with continuous batching: finished slots are refilled while others go on.

    prefill   [p1 p2]            into free slots, one program per bucket of prompt lengths
    decode    s1 s2 s3 s4 ...    a loop on the device until enough slots are done to refill them
    harvest   s2 s4              finished samples leave, their slots are free

A sample depends on the parameters, its prompt, the seed, the prompt's id, the sample index and the
sampling transform, and (but for ties within rounding) on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax.config import SamplingConfig
from opd_jax.core.mesh import axis_size, put_batch
from opd_jax.errors import ConfigError, DataError
from opd_jax.model.architecture import Architecture
from opd_jax.model.decode import split_layers
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.sampling import engine
from opd_jax.sampling.keys import root_key
from opd_jax.sampling.queue import Request, RequestQueue, bucket_of
from opd_jax.sampling.slots import Sample, SlotTable
from opd_jax.sampling.transforms import transform_of

__all__ = ["Request", "Sample", "generate"]

ROUND_STEPS = 64  # a finished sample waits at most this many steps before the host sees it


def generate(
    model: LanguageModel,
    params: Params,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    end_ids: tuple[int, ...],
    seed: int,
    mesh: Mesh | None,
) -> Iterator[Sample]:
    """Sample one response per request; they come as they finish, in no particular order.

    Every process of a job calls this with the same arguments and sees every sample. Programs are
    compiled once per model, sampling config, slots and bucket, whatever the parameters.

    Args:
        requests: equal (prompt id, sample index) give equal samples.
        end_ids: a response ends with the first of these tokens.
        mesh: where `params` live; `None`: one device.

    Raises:
        DataError: an empty prompt, one too long for the model, a token outside the vocabulary.
        ConfigError: an end token outside the vocabulary.
        ModelError: non-finite logits; samples that were finished by then have been yielded.
    """
    _check(model.arch, requests, sampling.max_new_tokens, end_ids)
    if not requests:
        return iter(())
    program = _program(model, requests, sampling, end_ids, mesh)
    return _run(program, params, requests, seed)


def _run(
    program: engine.Program, params: Params, requests: Sequence[Request], seed: int
) -> Iterator[Sample]:
    queue = RequestQueue(requests, program.slots, _shards(program.mesh))
    table = SlotTable(program)
    root = _put(program.mesh, root_key(seed))
    decode_params = split_layers(program.model, params)
    state = engine.empty_state(program)
    while queue or table.busy:
        firsts = []
        while queue and len(table.free) >= min(queue.rows(), len(queue)):
            slots, packed = table.admit(*queue.take())
            state, first = engine.prefill(program, params, state, _put(program.mesh, packed), root)
            firsts.append((slots, first))
        wake = min(queue.rows(), len(queue)) if queue else program.slots
        state, seen = engine.decode_round(
            program, decode_params, state, _put(program.mesh, np.int32(wake))
        )
        firsts, seen = jax.device_get((firsts, seen))
        for slots, first in firsts:
            table.record_first(slots, first)
        table.record_round(seen)
        yield from table.harvest(seen)
        table.refuse_broken(seen)


def _put(mesh: Mesh | None, host: np.ndarray | np.int32) -> Any:
    return jnp.asarray(host) if mesh is None else put_batch(mesh, host, sharded=False)


def _shards(mesh: Mesh | None) -> int:
    return 1 if mesh is None else axis_size(mesh, "batch")


def _program(
    model: LanguageModel,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    end_ids: tuple[int, ...],
    mesh: Mesh | None,
) -> engine.Program:
    shards = _shards(mesh)
    slots = min(sampling.slots, 1 << (len(requests) - 1).bit_length())
    longest = max(len(request.prompt_ids) for request in requests)
    return engine.Program(
        model=model,
        transform=transform_of(sampling),
        end_ids=tuple(sorted(end_ids)),
        mesh=mesh,
        slots=-(-slots // shards) * shards,
        cache_length=bucket_of(longest) + sampling.max_new_tokens,
        max_new_tokens=sampling.max_new_tokens,
        round_steps=ROUND_STEPS,
    )


def _check(
    arch: Architecture, requests: Sequence[Request], new: int, end_ids: Sequence[int]
) -> None:
    for end_id in end_ids:
        if not 0 <= end_id < arch.vocab_size:
            raise ConfigError(
                f"sampling: end token {end_id} is outside the vocabulary of {arch.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )
    for request in requests:
        _check_prompt(arch, request, new)


def _check_prompt(arch: Architecture, request: Request, new: int) -> None:
    ids, name = np.asarray(request.prompt_ids), f"sampling: prompt '{request.prompt_id}'"
    if ids.size == 0:
        raise DataError(f"{name} is empty; give it at least one token")
    if ids.size + new > arch.max_position:
        raise DataError(
            f"{name}: {ids.size} prompt tokens + max_new_tokens={new} exceed the model's "
            f"{arch.max_position} positions; shorten the prompt or lower max_new_tokens"
        )
    if ids.min() < 0 or ids.max() >= arch.vocab_size:
        bad = int(ids[(ids < 0) | (ids >= arch.vocab_size)][0])
        raise DataError(
            f"{name}: token {bad} is outside the vocabulary of {arch.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
