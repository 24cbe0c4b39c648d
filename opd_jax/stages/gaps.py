"""What has gone of what a finished stage left: commits are looked at, no token is read."""

from __future__ import annotations

from opd_jax.data.store import open_store
from opd_jax.data.store_files import SchemaVersionError
from opd_jax.errors import DataError
from opd_jax.stages.common import SampleTask
from opd_jax.stages.context import RunContext


def lacking_records(ctx: RunContext, task: SampleTask, snapshot: str | None) -> str:
    """Says which of the records that were sampled are not there, or not frozen; empty: all are.

    Args:
        snapshot: what they were frozen as; `None`: not recorded, so all that is committed.

    Raises:
        DataError: a commit is damaged, or of another schema version.
    """
    prompts, samples = ctx.prompts(task.split), task.sampling.samples_per_prompt
    wanted = {(prompt.id, index) for prompt in prompts for index in range(samples)}
    try:
        store = open_store(ctx.store_root(task.folder))
    except SchemaVersionError:
        raise
    except DataError:
        return f"{task.folder}/dataset.json is missing or damaged"
    lost = wanted - store.committed_keys()
    if lost:
        return f"{len(lost)} of {len(wanted)} records are missing"
    try:
        store.open_snapshot(snapshot or store.view().hash)
    except SchemaVersionError:
        raise
    except DataError:  # every segment was read: it is the document
        return "their snapshot is missing or of other segments"
    return ""


def lacking_scores(ctx: RunContext, folder: str, pass_name: str, snapshot: str | None) -> str:
    """Says how many records of a snapshot a pass has no scores of; empty: it covers all.

    Args:
        snapshot: as above.

    Raises:
        DataError: the snapshot or a commit is damaged, or of another schema version.
    """
    store = open_store(ctx.store_root(folder))
    frozen = store.open_snapshot(snapshot or store.view().hash)
    try:
        scores = store.open_pass(pass_name)
    except SchemaVersionError:
        raise
    except DataError:
        return f"teacher/{pass_name}/pass.json is missing or damaged"
    lost = len(frozen) - len(scores.committed_records(frozen))
    return f"{lost} of {len(frozen)} records have no scores" if lost else ""
