"""Compile a draft for its devices, and read what the compiler made of it."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax

from opd_jax.core.mesh_layout import island_of
from opd_jax.core.peak import peak_flops
from opd_jax.fit.changes import ACTIVATIONS
from opd_jax.fit.collectives import collectives
from opd_jax.fit.draft import Draft
from opd_jax.fit.hardware import RESERVE
from opd_jax.fit.hlo import parse_module
from opd_jax.fit.results import Bytes, ProgramReport
from opd_jax.fit.roofline import step_time
from opd_jax.fit.setup import Setup
from opd_jax.fit.traffic import memory_traffic
from opd_jax.model.experts import in_groups_anywhere

_NEEDED = re.compile(r"(?:[Uu]sed |temporaries \()([\d.]+)([KMGT]?)i?B?(?: of |\) exceeds)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_draft(setup: Setup, draft: Draft) -> ProgramReport:
    """Compile one program.

    A compiler that refuses for lack of memory says how much it would need, or how much of that are
    temporaries: the peak is then at least that, and at least what is known to lie there.
    """
    start = time.monotonic()
    problem, compiled = "", None
    try:
        compiled = draft.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        problem = str(error)
        if "RESOURCE_EXHAUSTED" not in problem and "out of memory" not in problem.lower():
            raise
    seconds = time.monotonic() - start
    parts, beside = draft.parts(), draft.beside()
    if compiled is None:
        parts = {**parts, **draft.passing}
        peak = max(said_bytes(problem), sum(parts.values()))
    else:
        peak, parts = _peak(compiled.memory_analysis(), parts, draft.passing)
    with in_groups_anywhere():  # experts: every pair once; how their blocks fill, the router says
        flops = draft.count()
    report = ProgramReport(
        name=draft.name,
        what=draft.what,
        stage=draft.stage,
        runs=draft.runs,
        tokens=draft.tokens,
        flops=flops,
        model_flops=draft.model_flops,
        peak_bytes=peak,
        parts=parts,
        beside=beside,
        room_bytes=int(setup.target.device.memory * (1 - RESERVE)),
        compile_seconds=round(seconds, 1),
        problem=_first_line(problem),
        host=draft.host,
    )
    return report if compiled is None else _timed(setup, draft, report, compiled.as_text())


def _peak(memory: Any, parts: Bytes, passing: Bytes) -> tuple[int, Bytes]:
    """Peak bytes, and its parts: named arguments, other arguments, named temporaries, the rest."""
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = dict(parts)
    found["other arguments"] = max(arguments - sum(parts.values()), 0)
    left = temporary
    for name, size in passing.items():
        found[name] = min(size, left)
        left -= found[name]
    found[ACTIVATIONS] = left
    found["results"] = max(results, 0)
    return arguments + temporary + results, {k: v for k, v in found.items() if v}


def said_bytes(problem: str) -> int:
    """The memory that a refusal names, 0 if it names none."""
    found = _NEEDED.search(problem)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def _first_line(problem: str) -> str:
    return problem.strip().splitlines()[0][:300] if problem else ""


def _timed(setup: Setup, draft: Draft, report: ProgramReport, text: str) -> ProgramReport:
    """With what follows from the compiled text: collectives, memory traffic, seconds."""
    module, device = parse_module(text), setup.target.device
    sizes = {name: int(size) for name, size in setup.mesh.shape.items()}
    islands = [island_of(x) for x in setup.mesh.devices.flat]
    sent = collectives(module, sizes, draft.loops, islands)
    traffic = memory_traffic(module, draft.loops)
    moved = 2 * sum(draft.host.values())
    taken = step_time(device, report.flops / setup.mesh.size, traffic, sent, moved)
    peak = peak_flops(device.kind)
    mfu = None
    if peak and taken.seconds:
        mfu = report.model_flops / taken.seconds / peak / setup.mesh.size
    return dataclasses.replace(report, collectives=sent, traffic_bytes=traffic, time=taken, mfu=mfu)
