"""A model to sample from by hand: texts, chats or token ids in, samples or a stream of text out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypedDict, Unpack

import numpy as np
from jax.sharding import Mesh
from pydantic import ValidationError

from opd_jax.config import SamplingConfig
from opd_jax.config_errors import describe
from opd_jax.data.tokenizer import Tokenizer, load_tokenizer
from opd_jax.errors import ConfigError, DataError
from opd_jax.model.decode import split_layers
from opd_jax.model.load import architecture_of, read_model, resolve_dtype
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.sampling.buckets import bucket_of, coarse_bucket_of
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import ROUND_STEPS, Plan, SamplingJob, generate, plan_for, rounds
from opd_jax.sampling.slots import Sample
from opd_jax.sampling.text_stream import TextStream, with_shown_text

Messages = Sequence[Mapping[str, str]]
PromptLike = str | Sequence[int] | np.ndarray | Messages
"""A text, its token ids, or a chat: `[{"role": "user", "content": "Hello"}]`."""

_PART = (int, np.integer, Mapping)  # what a list that is one prompt holds


class _Shapes(NamedTuple):
    """How lengths are rounded up, so that calls of about the same lengths share programs."""

    round_steps: int
    bucket: Callable[[int], int]
    least_length: int = 0  # of prompt and response together


_BATCH = _Shapes(ROUND_STEPS, bucket_of)
_STREAM = _Shapes(round_steps=4, bucket=coarse_bucket_of, least_length=1024)


class Settings(TypedDict, total=False):
    """What `SamplingConfig` holds, whose defaults and bounds they have.

    Without `max_new_tokens`, a response has at most what room the model's positions leave after its
    prompt, and at most 4,096 tokens or `min_new_tokens`.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    max_new_tokens: int
    min_new_tokens: int
    stop: str | Sequence[str]
    slots: int


@dataclass(frozen=True)
class Sampler:
    """A model with its parameters and tokenizer.

    A text is read as the beginning of a document, a chat through the model's chat template. For
    what a template is asked beyond the messages, hand in the ids of `tokenizer.encode_chat`.
    """

    model: LanguageModel
    params: Params = field(repr=False)
    tokenizer: Tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        mesh: Mesh | None = None,
        compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        param_dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> Self:
        """Read a Hugging Face folder or a .gguf file.

        Args:
            mesh: devices to spread the model and its samples over; `None`: the first one.
            compute_dtype: `auto`: bfloat16 on accelerators, float32 on CPU.
            param_dtype: `None`: as `compute_dtype`.

        Raises:
            ModelError: it is missing, damaged or not supported.
        """
        compute = resolve_dtype(compute_dtype)
        tokenizer, dtype = load_tokenizer(path, chats=False), param_dtype or compute
        tokenizer.check_vocabulary(architecture_of(path).vocab_size, path)
        model, params = read_model(path, dtype, compute, mesh=mesh, tokens=tokenizer.vocab_size)
        return cls(model, params, tokenizer)

    def sample(
        self,
        prompts: Sequence[PromptLike],
        n: int = 1,
        *,
        seed: int = 0,
        ids: Sequence[str] | None = None,
        each: Sequence[Settings] | None = None,
        **settings: Unpack[Settings],
    ) -> list[Sample]:
        """`n` responses to every prompt, those of the first prompt first.

        A sample depends on its prompt, the settings, the seed, the prompt's id and the sample's
        index, not on what else is sampled. Its text ends before a stop string.

        Args:
            ids: of the prompts; `None`: "0", "1", ...
            each: for every prompt, settings that replace the others for it: all but `slots`.

        Raises:
            DataError: a prompt that is none, or too long for the model.
            ConfigError: a setting that is unknown or out of bounds, or too little memory.
        """
        given: list[Any] = list(prompts)
        if isinstance(prompts, str) or (given and isinstance(given[0], _PART)):
            raise DataError(f"sampling: prompts={prompts!r:.60} is one prompt; give a list of them")
        if type(n) is not int or n < 1:
            raise ConfigError(f"sampling: n={n!r}; ask for at least 1 sample of a prompt")
        if not given:
            return []
        names: list[Any] = [str(i) for i in range(len(given))] if ids is None else list(ids)
        if len(set(names)) != len(given) or len(names) != len(given):
            raise DataError(
                f"sampling: {len(names)} ids, {len(set(names))} different ones, for {len(given)} "
                "prompts; give every prompt its own id"
            )
        if not all(isinstance(name, str) for name in names):
            raise DataError(f"sampling: ids={names!r:.60}; give every prompt a text as its id")
        own = _for_each(settings, each, len(given))
        asked = [
            self._request(Request(name, j, ids_p), more)
            for name, ids_p, more in zip(names, map(self._encode, given, names), own, strict=True)
            for j in range(n)
        ]
        job, plan = self._prepare(asked, settings, seed, _BATCH)
        found = {_key(sample.request): sample for sample in generate(job, asked, plan)}
        return [self._shown(found[_key(request)]) for request in asked]

    def stream(
        self,
        prompt: PromptLike,
        *,
        seed: int = 0,
        prompt_id: str = "0",
        sample_index: int = 0,
        **settings: Unpack[Settings],
    ) -> TextStream:
        """The text of one response in pieces, while it is drawn; its sample is that of `sample`.

        Raises:
            DataError, ConfigError: as `sample`, before anything is drawn.
        """
        settings = {**settings, "slots": 1}
        asked = Request(prompt_id, sample_index, self._encode(prompt, prompt_id))
        requests = [self._request(asked, settings)]
        job, plan = self._prepare(requests, settings, seed, _STREAM)
        begin = functools.partial(rounds, job, requests, plan)
        return TextStream(begin, self.tokenizer.decode, job.sampling.stop)

    @functools.cached_property
    def _split(self) -> Params:
        return split_layers(self.model, self.params)

    def _prepare(
        self,
        requests: Sequence[Request],
        settings: Settings,
        seed: int,
        shapes: _Shapes,
    ) -> tuple[SamplingJob, Plan]:
        positions, sampling = self.model.arch.max_position, _checked(settings)
        limits = [(r.sampling or sampling).max_new_tokens for r in requests]
        totals = [len(r.prompt_ids) + limit for r, limit in zip(requests, limits, strict=True)]
        longest = max(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        job = SamplingJob(
            self.model,
            self.params,
            sampling,
            self.tokenizer.end_ids,
            seed,
            self.tokenizer.decode,
            shapes.round_steps,
            self.__dict__.get("_split"),  # there from the second call on
            shapes.bucket,
        )
        length = shapes.bucket(max(*totals, shapes.least_length))
        room = min(length, positions) - limits[longest]
        plan = plan_for(job, requests, longest_prompt=room)
        return dataclasses.replace(job, split=self._split), plan

    def _request(self, request: Request, settings: Settings) -> Request:
        """With its settings; without a limit, one that fits what its own prompt leaves."""
        sampling = _checked(settings)
        if "max_new_tokens" not in settings:
            room = self.model.arch.max_position - len(request.prompt_ids)
            most = max(min(sampling.max_new_tokens, room), sampling.min_new_tokens, 1)
            sampling = sampling.model_copy(update={"max_new_tokens": most})
        return dataclasses.replace(request, sampling=sampling)

    def _shown(self, sample: Sample) -> Sample:
        sampling = sample.request.sampling
        stops = () if sampling is None else sampling.stop
        return with_shown_text(sample, stops, self.tokenizer.decode)

    def _encode(self, prompt: PromptLike, name: str) -> np.ndarray:
        """int32 token ids of a prompt."""
        if isinstance(prompt, str):
            return np.array(self.tokenizer.encode_opening(prompt), np.int32)
        given: Any = prompt
        parts: list[Any] = list(given) if isinstance(given, Iterable) else [""]
        if parts and all(map(_is_message, parts)):
            return np.array(self.tokenizer.encode_chat(parts), np.int32)
        if all(isinstance(part, int | np.integer) for part in parts):
            # What int32 does not hold is outside every vocabulary, and is refused as such.
            most = np.iinfo(np.int32).max
            return np.array([min(max(int(part), -1), most) for part in parts], np.int32)
        raise DataError(
            f"sampling: prompt '{name}' is {prompt!r:.60}; give a text, a list of token ids, or a "
            "list of messages with 'role' and 'content'"
        )


def _checked(settings: Settings) -> SamplingConfig:
    """The settings with defaults."""
    values: dict[str, Any] = dict(settings)
    if "samples_per_prompt" in values:
        raise ConfigError("sampling: unknown key 'samples_per_prompt'; give n")
    if isinstance(stop := values.get("stop"), str):
        values["stop"] = (stop,)
    least, most = values.get("min_new_tokens", 0), SamplingConfig().max_new_tokens
    if type(least) is int and least > most:
        values.setdefault("max_new_tokens", least)
    try:
        return SamplingConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, "sampling", {}, SamplingConfig)) from None


def _for_each(settings: Settings, each: Sequence[Settings] | None, prompts: int) -> list[Settings]:
    """The settings of every prompt.

    Raises:
        ConfigError: there are more or fewer than prompts, or one has slots of its own.
    """
    if each is None:
        return [settings] * prompts
    if len(each) != prompts:
        raise ConfigError(
            f"sampling: each has settings for {len(each)} prompts, there are {prompts}; give {{}} "
            "for a prompt without its own"
        )
    if any("slots" in more for more in each):
        raise ConfigError("sampling: each: slots are shared; give them once, beside each")
    return [{**settings, **more} for more in each]


def _key(request: Request) -> tuple[str, int]:
    return request.prompt_id, request.sample_index


def _is_message(part: Any) -> bool:
    return isinstance(part, Mapping) and all(
        isinstance(part.get(key), str) for key in ("role", "content")
    )
