"""What every stage is handed: the config, the mesh, the models and the run folder."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from opd_jax.config import Config, ScoreConfig
from opd_jax.core.distributed import from_first, is_first
from opd_jax.core.lineage import Identity, TokenizerParts, fingerprint_json, fingerprint_params
from opd_jax.core.rng import stable_hash
from opd_jax.data.prompts import Prompt, load_prompts
from opd_jax.data.store_files import StoreFiles, is_url
from opd_jax.data.tokenizer import Tokenizer, load_tokenizer
from opd_jax.data.tokenizer_probe import parts_of
from opd_jax.errors import ConsistencyError, DataError
from opd_jax.model.architecture import Architecture
from opd_jax.model.fingerprint import files_stamp, weights_fingerprint
from opd_jax.model.load import architecture_of, padding_start, read_model, resolve_dtype
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.stages.records import Artefact, Json, StageRecords, read_json, write_json
from opd_jax.teacher.consistency import check_tokenizers, recorded
from opd_jax.train import checkpoint

Role = Literal["student", "teacher"]
ROLES: tuple[Role, ...] = ("student", "teacher")
Split = Literal["sft", "opd", "eval"]
EncodedPrompt = tuple[str, list[int]]
NOT_INPUTS = frozenset({"slots", "save_every", "micro_batch_size", "on_nonfinite"})
"""Config keys that change how fast a result is there, or whether, not what it is."""


@dataclass(frozen=True)
class RunContext:
    """One run on one mesh."""

    config: Config
    run_dir: Path
    mesh: Mesh
    records: StageRecords
    profile: bool = False
    """Write a trace of a few steps of each training."""
    share: tuple[int, int] | None = None
    """(index, count): do this share of a stage alone, beside runs that meet in the store alone."""
    _cache: dict[Any, Any] = field(default_factory=dict)

    def settings(self, node: Any) -> Json:
        """A config node as a stage's input."""
        # Of scores it is the cost; of a training run, which records a step takes.
        cost = {"batch_tokens"} if isinstance(node, ScoreConfig) else set[str]()
        free = NOT_INPUTS | cost
        if getattr(node, "router_balance", 0.0):
            free = free - {"micro_batch_size"}  # the balance is that of each micro-batch
        found = {k: v for k, v in node.model_dump(mode="json").items() if k not in free}
        if "optim" in found:
            del found["optim"]["offload"]  # where moments lie
        return found

    def seed(self, stream: str) -> int:
        """A seed of its own for every purpose."""
        return stable_hash(f"{self.config.seed}/{stream}")

    def path(self, role: Role) -> str:
        """Where a model is read from."""
        return self.config.model.student if role == "student" else self.config.model.teacher

    @functools.cached_property
    def compute_dtype(self) -> str:
        """`auto` resolved: bfloat16 on accelerators, float32 on CPU."""
        return resolve_dtype(self.config.model.compute_dtype)

    def numerics(self) -> Json:
        """The precisions, as inputs of every stage that runs a model."""
        return {"param_dtype": self.config.model.param_dtype, "compute_dtype": self.compute_dtype}

    def program(self, role: Role) -> LanguageModel:
        """A model of the config without its parameters."""
        arch, config = architecture_of(self.path(role)), self.config.model
        padded_from = padding_start(arch, self.tokenizer(role).vocab_size)
        return LanguageModel(
            arch, self.compute_dtype, config.remat, self.mesh, config.attention, padded_from
        )

    def check_models(self) -> None:
        """Raises ConsistencyError unless ids mean the same to teacher and student.

        Each has a row for every token of its tokenizer; what they have beyond is masked.
        """
        for role in ROLES:
            rows, path = architecture_of(self.path(role)).vocab_size, self.path(role)
            self.tokenizer(role).check_vocabulary(rows, path)
        check_tokenizers(self.tokenizer("student"), self.tokenizer("teacher"))

    def model(self, role: Role) -> tuple[LanguageModel, Params]:
        """A model of the config with its parameters; kept for the next stage that asks.

        Raises:
            ConsistencyError: its files have changed since the run first read them.
        """
        key = ("model", role)
        if key not in self._cache:
            config = self.config.model
            self._check_files(role)
            loaded = read_model(
                self.path(role),
                config.param_dtype,
                self.compute_dtype,
                config.remat,
                self.mesh,
                config.attention,
                self.tokenizer(role).vocab_size,
            )
            self._check_files(role)
            rows = loaded[0].arch.vocab_size
            self.tokenizer(role).check_vocabulary(rows, self.path(role))
            self._cache[key] = loaded
        return self._cache[key]

    def release_models(self) -> None:
        """Let go of the models' memory between two stages."""
        for key in [key for key in self._cache if key[0] == "model"]:
            del self._cache[key]

    def tokenizer(self, role: Role = "student") -> Tokenizer:
        """The tokenizer that belongs to a model of the config."""
        key = ("tokenizer", role)
        if key not in self._cache:
            self._cache[key] = load_tokenizer(self.path(role))
        return self._cache[key]

    def identity(self, role: Role) -> Identity:
        """Who a model of the config is; of large weights this is kept beside them.

        Raises:
            ConsistencyError: its files have changed since the run first read them.
        """
        key, path = ("identity", role), self.path(role)
        if key not in self._cache:
            self._check_files(role)
            identity = Identity(
                path,
                self._weights_fingerprint(path),
                architecture_fingerprint(architecture_of(path)),
                self.tokenizer(role).fingerprint,
                self._tokenizer_parts(role),
            )
            self._check_files(role)
            self._cache[key] = identity
        return self._cache[key]

    def _check_files(self, role: Role) -> None:
        """A run reads a model once a stage, and asks only once who it is."""
        now, path = files_stamp(Path(self.path(role))), self.path(role)
        then = self._cache.setdefault(("files", role), now)
        changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
        if changed:
            raise ConsistencyError(
                f"model.{role}: {', '.join(changed)} of {path} changed since this run first read "
                "it; run again: if the weights are others, that is another model"
            )

    def _weights_fingerprint(self, path: str) -> str:
        """Process 0 reads the files for all."""
        kept = self.run_dir / "fingerprints.json"
        return from_first(weights_fingerprint(path, kept) if is_first() else "")

    def _tokenizer_parts(self, role: Role) -> TokenizerParts:
        key = ("parts", role)
        if key not in self._cache:
            self._cache[key] = parts_of(self.tokenizer(role))
        return self._cache[key]

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of a split."""
        config = self.config.prompts
        return load_prompts(getattr(config, split), getattr(config, f"{split}_limit"))

    def prompts_fingerprint(self, split: Split) -> str:
        """Changes with any prompt, its order aside, and with how prompts are rendered."""
        config = self.config.prompts
        rows = sorted((p.id, list(p.messages), p.answer) for p in self.prompts(split))
        return fingerprint_json([rows, config.system, config.enable_thinking])

    def encoded_prompts(self, split: Split) -> list[EncodedPrompt]:
        """(id, token ids) of every prompt of a split, rendered with the student's chat template.

        Raises:
            DataError: a prompt is longer than the config or the model allows.
        """
        config = self.config.prompts
        tokenizer = self.tokenizer("student")
        rows = []
        for prompt in self.prompts(split):
            ids = tokenizer.encode_chat(prompt.messages, config.enable_thinking, config.system)
            if len(ids) > config.max_prompt_tokens:
                raise DataError(
                    f"{getattr(config, split)}: prompt '{prompt.id}' has {len(ids)} tokens, more "
                    f"than prompts.max_prompt_tokens={config.max_prompt_tokens}; shorten it or "
                    "raise the limit"
                )
            rows.append((prompt.id, ids))
        return rows

    def store_root(self, folder: str) -> str:
        """Where one of the run's token stores lies."""
        return f"{(self.config.store or str(self.run_dir)).rstrip('/')}/{folder}"

    def store_artefact(self, folder: str) -> Artefact:
        """A store, or a folder in one, as what a stage leaves behind."""
        root = self.store_root(folder)
        return StoreFiles(root) if is_url(root) else Path(root)

    def checkpoint_dir(self, name: str) -> Path:
        """Where a training run keeps its state, its final model and its lineage."""
        return self.run_dir / "checkpoints" / name

    def student_identity(self, name: str, params: Params) -> Identity:
        """Who a student with these parameters is."""
        return Identity(
            name,
            fingerprint_params(params),
            architecture_fingerprint(self.program("student").arch),
            self.tokenizer("student").fingerprint,
            self._tokenizer_parts("student"),
        )

    def save_model(self, name: str, params: Params, lineage: Json) -> Identity:
        """Keep a trained model's parameters with their lineage; returns who it is."""
        identity = self.student_identity(f"checkpoint {name}", params)
        folder = self.checkpoint_dir(name)
        checkpoint.save(folder / "model", 0, params, {"identity": identity.to_json()}, keep=1)
        write_json(folder / "lineage.json", {"model": identity.to_json(), **lineage})
        return identity

    def trained(self, name: str) -> tuple[LanguageModel, Params]:
        """A trained model with its parameters, digests verified."""
        model = self.program("student")
        abstract = model.abstract(self.config.model.param_dtype)
        params, _, _ = checkpoint.restore(self.checkpoint_dir(name) / "model", None, abstract)
        return model, params

    def lineage(self, name: str) -> Json:
        """The lineage of a trained model.

        Raises:
            ConsistencyError: it is missing.
        """
        path = self.checkpoint_dir(name) / "lineage.json"
        lineage = read_json(path)
        if lineage is None:
            stage = name if name == "sft" else f"train.{name}"
            raise ConsistencyError(
                f"missing lineage: {path} is not there, so nothing says which teacher and student "
                f"'{name}' comes from; redo it with --force {stage}"
            )
        return lineage

    def checkpoint_model(self, name: str) -> tuple[LanguageModel, Params]:
        """A model by the name it has in the results: `base`, `teacher` or a trained one."""
        if name in ("base", "teacher"):
            return self.model("student" if name == "base" else "teacher")
        return self.trained(name)

    def checkpoint_identity(self, name: str) -> Identity:
        """Who the model of that name is."""
        if name in ("base", "teacher"):
            return self.identity("student" if name == "base" else "teacher")
        return self.recorded(name, "model")

    def recorded(self, name: str, key: str) -> Identity:
        """A model that the lineage of a trained model names.

        Raises:
            ConsistencyError: it does not.
        """
        stage = name if name == "sft" else f"train.{name}"
        return recorded(self.lineage(name), key, lineage_file(name), stage)


def lineage_file(name: str) -> str:
    """Where the lineage of a trained model lies in the run folder."""
    return f"checkpoints/{name}/lineage.json"


def architecture_fingerprint(arch: Architecture) -> str:
    """Fingerprint of sizes and switches."""
    return fingerprint_json(asdict(arch))
