"""The rollouts of a run's rounds: sampled from its current student, scored, each in its store."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from opd_jax.config_train import TrainRun
from opd_jax.core.distributed import is_first
from opd_jax.core.mesh import axis_size
from opd_jax.core.progress import say, stage_line
from opd_jax.data.store import Store, create_store, open_store
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import ConsistencyError
from opd_jax.model.transformer import Params
from opd_jax.sampling.collect import Work
from opd_jax.sampling.sampler import SamplingJob, plan_for
from opd_jax.stages.common import ScoreTask, fill_store, freeze_all, pass_name, score
from opd_jax.stages.context import RunContext
from opd_jax.stages.records import Json
from opd_jax.stages.watching import rollout_probe
from opd_jax.teacher.consistency import check_same_model, recorded
from opd_jax.teacher.summary import lines, summarize
from opd_jax.train.batch_source import NextBatch, Source
from opd_jax.train.guard import Figures
from opd_jax.train.probes import Probe
from opd_jax.train.rounds import PromptPlan, Rounds
from opd_jax.train.sources import Packing, name_of, rollout_source


class Rollouts(NamedTuple):
    """A frozen set of rollouts with its scores."""

    snapshot: Snapshot
    scores: TeacherPass


def round_inputs(ctx: RunContext) -> Json:
    """What the rounds of a run depend on, beside the run's own settings and first rollouts."""
    return {
        "teacher": ctx.identity("teacher").fingerprint,
        "prompts": ctx.prompts_fingerprint("opd"),
        "rollout": ctx.settings(ctx.config.rollout),
        "score": ctx.settings(ctx.config.score),
    }


def rounds_folder(name: str) -> str:
    """Where the stores of a run's rounds lie, below the run's other stores."""
    return f"rounds/{name}"


class RoundRollouts:
    """The rollouts of the round under way, as batches to train on and as an evaluation."""

    def __init__(
        self, ctx: RunContext, name: str, rounds: Rounds, first: Rollouts, support: int
    ) -> None:
        """Round 0 has `first`.

        Raises:
            ConsistencyError: these are of other prompts or by another teacher than the config's.
        """
        self.ctx, self.name, self.rounds = ctx, name, rounds
        self._tested = False
        self.run: TrainRun = ctx.config.train.runs[name]
        prompts = ctx.encoded_prompts("opd")
        samples = ctx.config.rollout.samples_per_prompt
        self.plan = PromptPlan.of(prompts, samples, self.run, ctx.seed("train"))
        self.scoring = ScoreTask(
            f"train.{name}",
            ctx.identity("teacher"),
            first.scores.meta["top_k"],
            ctx.config.score.batch_tokens,
            ctx.config.score.entropy,
        )
        self._check_first(first)
        prompt_r, response_r = first.snapshot.lengths()
        later = max(len(ids) for _, ids in prompts) + ctx.config.rollout.max_new_tokens
        longest = max(later, int((prompt_r + response_r).max()))
        ways, parts = (axis_size(ctx.mesh, axis) for axis in ("batch", "time"))
        self.packing = Packing.of(self.run, longest, ways, support, parts, ctx.mesh)
        rounds.snapshots[:] = [first.snapshot.hash]
        self._use(first)

    def _check_first(self, first: Rollouts) -> None:
        where = f"rollouts/teacher/{first.scores.name}/pass.json"
        scored = recorded(first.scores.meta, "teacher", where, "score")
        live = self.scoring.teacher
        check_same_model(live, scored, "the teacher of the scores", where, "score")
        if set(first.snapshot.keys) != {
            (r.prompt_id, r.sample_index) for r in self.plan.everything
        }:
            raise ConsistencyError(
                f"train.{self.name}: the rollouts answer other prompts, or other samples of them, "
                f"than refresh would draw from {self.ctx.config.prompts.opd} now; redo them with "
                "--force rollout,score"
            )

    def source(self) -> Source:
        """The batches of all rounds; at the first of a round its rollouts are drawn."""
        pieces = self.packing.shape(self.run.batch_size)[0]
        return Source(self._start, pieces, names=self._names)

    def _names(self, step: int) -> list[str]:
        requests = (self.plan.everything[i] for i in self.plan.steps[step])
        return [name_of((request.prompt_id, request.sample_index)) for request in requests]

    def probe(self, params: Params) -> Figures:
        """The figures of held-out rollouts of the round under way."""
        return self._probe(params)

    def _use(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        records = {key: index for index, key in enumerate(rollouts.snapshot.keys)}
        wanted = [(r.prompt_id, r.sample_index) for r in self.plan.everything]
        self._at = {i: records[key] for i, key in enumerate(wanted) if key in records}
        kept = [self._at[i] for i in self.plan.kept]
        if kept:
            found = rollout_probe(self.ctx, self.run, self.packing, rollouts, kept)
            self._probe: Probe = found

    def _start(self, _step: int) -> NextBatch:
        opened, following = -1, None

        def next_batch(step: int, current: Callable[[], Params]) -> object:
            nonlocal opened, following
            if following is None or opened != self.rounds.number:
                opened = self.rounds.number
                self._open(current)
                following = self._batches().start(step - self.rounds.starts[-1])
            return following(step, current)

        return next_batch

    def _batches(self) -> Source:
        """The steps of the round under way, its first one being 0."""
        steps = self.plan.steps[self.rounds.starts[-1] : self.rounds.end]
        taken = [[self._at[i] for i in step] for step in steps]
        return rollout_source(*self._rollouts, taken, self.packing, self.run.batch_size)

    def _open(self, current: Callable[[], Params]) -> None:
        """Find the rollouts of the round under way, or draw them."""
        number = self.rounds.number
        if number == 0:
            return
        folder = f"{rounds_folder(self.name)}/round_{number}/rollouts"
        if number < len(self.rounds.snapshots):
            store = open_store(self.ctx.store_root(folder))
            snapshot = store.open_snapshot(self.rounds.snapshots[number])
            self._use(Rollouts(snapshot, store.open_pass(pass_name(self.scoring))))
            return
        store, snapshot = self._sample(folder, current())
        # In one process all rounds have one program and teacher: one test is enough.
        unit = f"scored for round {number}"
        scoring = self.scoring._replace(unit=unit, self_test=not self._tested)
        scores, _ = score(self.ctx, scoring, store, snapshot)
        self._tested = True
        if is_first():
            told = lines(summarize(snapshot, scores, lambda _ids: ""), shown=0)
            say(stage_line(f"train.{self.name}", f"round {number}: {told[0]}"))
        if not self.run.guard.teacher:
            self.ctx.release_models()  # the teacher's memory is the training's again
        self.rounds.snapshots.append(snapshot.hash)
        self._use(Rollouts(snapshot, scores))

    def _sample(self, folder: str, params: Params) -> tuple[Store, Snapshot]:
        """The current student's answers to what the round trains on and is evaluated by."""
        ctx, number, start = self.ctx, self.rounds.number, self.rounds.starts[-1]
        stage, config = f"train.{self.name}", self.ctx.config
        identity = ctx.student_identity(f"{stage} after {start} steps", params)
        meta = {
            "kind": "rollouts",
            "round": number,
            "step": start,
            "generator": identity.to_json(),
            "sft_teacher": ctx.recorded("sft", "sft_teacher").to_json(),
            "sampling": ctx.settings(config.rollout),
            "prompts": ctx.prompts_fingerprint("opd"),
            "seed": config.seed,
        }
        store = create_store(ctx.store_root(folder), meta)
        requests = self.plan.requests(start, self.rounds.end)
        slots = min(config.rollout.slots, 1 << (len(requests) - 1).bit_length())
        tokenizer = ctx.tokenizer("student")
        job = SamplingJob(
            ctx.program("student"),
            params,
            config.rollout.model_copy(update={"slots": slots}),
            tokenizer.end_ids,
            ctx.seed(f"rollout/{self.name}/{number}"),
            tokenizer.decode if config.rollout.stop else None,
        )
        # One plan for all rounds, whichever prompts they have: nothing compiles again.
        work = Work(requests, plan_for(job, self.plan.everything, together=False))
        say(stage_line(stage, f"round {number} begins after {start} steps"))
        fill_store(ctx, (stage, f"sampled for round {number}"), job, store, work)
        return store, freeze_all(store, requests, folder, stage)
