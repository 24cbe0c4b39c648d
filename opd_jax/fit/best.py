"""`--fit auto`: the best of several meshes on one target."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from opd_jax.config import Config
from opd_jax.fit.assess import Say, assess
from opd_jax.fit.results import FitReport, MeshTry
from opd_jax.fit.topology import devices_of
from opd_jax.train.mesh_choice import choices


def assess_meshes(config: Config, target: str, stages: Sequence[str] | None, say: Say) -> FitReport:
    """The report of the mesh that fits and takes fewest hours, else of that which needs least.

    A config that names its mesh has one to judge. No mesh is compiled further than its first
    program that does not fit.

    Raises:
        OPDError: the target, the config or a model is wrong, or no mesh fits the batches.
    """
    if config.mesh is not None:
        return assess(config, target, stages, say, quick=True)
    found: list[tuple[MeshTry, FitReport]] = []
    for mesh in choices(config, devices_of(target)):
        report = assess(config.model_copy(update={"mesh": mesh}), target, stages, say, quick=True)
        found.append((_tried(report), report))
    report = min(found, key=lambda pair: _cost(pair[0]))[1]
    return dataclasses.replace(report, meshes=[tried for tried, _ in found])


def _tried(report: FitReport) -> MeshTry:
    needed = max(program.needed_bytes for program in report.programs)
    hours = sum(report.hours.values()) if report.fits else None
    return MeshTry(report.mesh, report.fits, needed, hours)


def _cost(tried: MeshTry) -> tuple[bool, float, int]:
    hours = math.inf if tried.hours is None else tried.hours
    return not tried.fits, hours, tried.needed_bytes
