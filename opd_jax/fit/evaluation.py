"""What a run on stored rollouts samples and scores with at its evaluations, beside its state."""

from __future__ import annotations

import dataclasses

from opd_jax.config_train import TrainRun
from opd_jax.fit.draft import Draft
from opd_jax.fit.sampling import sampling_drafts
from opd_jax.fit.scoring import scoring_draft
from opd_jax.fit.setup import Setup
from opd_jax.train.probes import fresh_sampling

EVALUATION = "evaluation."
"""How names of these programs begin."""


def evaluation_drafts(setup: Setup, run: TrainRun) -> list[Draft]:
    """Its programs for fresh samples of held-out prompts, none if it takes none.

    None of a run that draws, either: it has those of its draws, which are no smaller.
    """
    config, samples = setup.config, setup.config.rollout.samples_per_prompt
    held_out = min(run.heldout, setup.prompts("opd") * samples // 10) // samples
    prompts = min(run.guard.fresh, held_out)
    if run.draws or run.algorithm == "sft" or not prompts:
        return []
    changes = {
        "prompts": config.prompts.model_copy(update={"opd_limit": prompts}),
        "rollout": fresh_sampling(config.rollout, prompts),
        "score": config.score.model_copy(update={"top_k": 0}),
        "train": config.train.model_copy(update={"enabled": ()}),  # samples are drawn together
    }
    own = dataclasses.replace(setup, config=config.model_copy(update=changes))
    drafts = sampling_drafts(own, "rollout")
    if run.guard.teacher:
        drafts.append(scoring_draft(own))
    names = [EVALUATION + draft.name.removeprefix("rollout.") for draft in drafts]
    return [
        dataclasses.replace(draft, name=name) for draft, name in zip(drafts, names, strict=True)
    ]
