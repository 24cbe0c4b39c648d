"""`--chat` and `--prompt`: try a model of the run, its text shown while it is drawn."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from opd_jax.config import Config, SamplingConfig
from opd_jax.errors import ConfigError, DataError, OPDError, StageError
from opd_jax.sampling.api import Sampler
from opd_jax.sampling.slots import Sample
from opd_jax.stages.context import RunContext
from opd_jax.stages.records import StageRecords
from opd_jax.train.mesh_choice import mesh_of

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def run(config: Config, name: str | None, prompt: str | None) -> None:
    """Answer one prompt, or with `prompt=None` whatever is typed.

    Args:
        name: of the checkpoint in the results; `None`: the last trained one.

    Raises:
        OPDError: as its message says.
    """
    run_dir = Path(config.run_dir)
    ctx = RunContext(config, run_dir, mesh_of(config), StageRecords(run_dir))
    name = checkpoint_name(ctx, name)
    _tell(f"loading {name}; the first answer also waits for the compiler")
    model, params = ctx.checkpoint_model(name)
    sampling = config.answer if name == "teacher" else config.rollout
    chat = Chat(ctx, Sampler(model, params, ctx.tokenizer("student")), sampling)
    if prompt is not None:
        chat.answer(prompt)
        return
    block = "answer" if name == "teacher" else "rollout"
    _tell(
        f"{name}, temperature {sampling.temperature:g} ({block}.temperature=... changes it); "
        "Ctrl-C stops an answer, /reset forgets the conversation, /exit leaves"
    )
    _converse(chat)


def checkpoint_name(ctx: RunContext, name: str | None) -> str:
    """The checkpoint to sample from, checked.

    Raises:
        ConfigError: there is no checkpoint of that name.
        StageError: it is not trained yet.
    """
    stages = {"sft": "sft"} | {run: f"train.{run}" for run in ctx.config.train.runs}
    if name is None:
        last = [*ctx.config.train.enabled[::-1], "sft"]
        done = [run for run in last if ctx.records.done(stages[run]) is not None]
        if not done:
            raise StageError(
                f"run_dir '{ctx.run_dir}' holds no trained student; run --stages answer,sft first, "
                "or take another model with --checkpoint base or --checkpoint teacher"
            )
        return done[0]
    if name not in ("base", "teacher", *stages):
        known = ("base", *stages, "teacher")
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known)}"
        raise ConfigError(f"--checkpoint {name}: no such checkpoint; {hint}")
    if name in stages and ctx.records.done(stages[name]) is None:
        raise StageError(
            f"--checkpoint {name}: stage '{stages[name]}' is not complete in run_dir "
            f"'{ctx.run_dir}'; run it first (the same command without --chat and --prompt)"
        )
    return name


@dataclass
class Chat:
    """A conversation that is kept."""

    ctx: RunContext
    sampler: Sampler
    sampling: SamplingConfig
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: int = 0

    def answer(self, text: str) -> None:
        """Print the answer to a message while it is drawn, and keep both.

        Ctrl-C ends the answer, and is raised; what was said until then is kept.

        Raises:
            DataError: the message does not fit the model; it is not kept.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        asked, ids, room = self._fitting(asked)
        limit = min(self.sampling.max_new_tokens, room)
        settings = self.sampling.model_dump(exclude={"samples_per_prompt", "slots"})
        settings["max_new_tokens"] = limit
        settings["min_new_tokens"] = min(limit, self.sampling.min_new_tokens)
        self.turns += 1
        seed, turn = self.ctx.seed("chat"), f"turn {self.turns}"
        clock, said = _Clock(), ""
        stream = self.sampler.stream(ids, seed=seed, prompt_id=turn, **settings)
        try:
            for piece in stream:
                said += piece
                clock.note(len(stream.token_ids))
                _write(piece)
        finally:
            _write("\n")
            if said:
                self.messages = [*asked, {"role": "assistant", "content": said}]
        if stream.sample is not None:
            _tell(clock.line(stream.sample))

    def _fitting(
        self, messages: list[dict[str, str]]
    ) -> tuple[list[dict[str, str]], list[int], int]:
        """The messages, their token ids, and the positions left for the answer.

        The oldest turns are left out where there is no room for a quarter of the positions, or for
        the longest answer if that is less.
        """
        positions = self.sampler.model.arch.max_position
        wanted = min(self.sampling.max_new_tokens, max(positions // 4, 1))
        ids: list[int] = []
        for start in range(0, len(messages), 2):
            ids = self._encode(messages[start:])
            if len(ids) + wanted <= positions:
                if start:
                    _tell(f"(the oldest {start} messages no longer fit {positions} positions)")
                return messages[start:], ids, positions - len(ids)
        raise DataError(
            f"the message has {len(ids)} tokens with the chat template around it, and leaves no "
            f"{wanted} of the model's {positions} positions for the answer; shorten it"
        )

    def _encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        prompts = self.ctx.config.prompts
        return self.sampler.tokenizer.encode_chat(messages, prompts.enable_thinking, prompts.system)


class _Clock:
    """When an answer began, and when its first tokens were there."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None  # seconds, tokens

    def note(self, tokens: int) -> None:
        """So many tokens are there."""
        if self._first is None:
            self._first = (time.monotonic() - self._start, tokens)

    def line(self, sample: Sample) -> str:
        """Tokens, speed after the first tokens, and the time that those took."""
        seconds, tokens = time.monotonic() - self._start, len(sample.token_ids)
        first, early = self._first or (seconds, tokens)
        parts = [f"{tokens} tokens"]
        if tokens > early:
            parts.append(f"{(tokens - early) / max(seconds - first, 1e-9):,.1f} tokens/s")
        parts.append(f"first after {first:.2f} s")
        if sample.finish_reason == "length":
            parts.append("cut at its limit")
        return ", ".join(parts)


def _converse(chat: Chat) -> None:
    """Read messages until there are no more."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # it gives `input` its history and its arrow keys
            importlib.import_module("readline")
    while True:
        try:
            text = input("> " if terminal else "").strip()
            if text == "/exit":
                return
            if text == "/reset":
                chat.messages = []
            elif text:
                chat.answer(text)
        except EOFError:
            _tell("")
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            _tell("")
        except OPDError as error:
            if not terminal:
                raise
            print(f"opd_jax: error: {error}", file=sys.stderr)


def _write(piece: str) -> None:
    """Print text of a model; a terminal gets none of its control characters."""
    sys.stdout.write(_CONTROL.sub("\ufffd", piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def _tell(text: str) -> None:
    """A dim line for a person; where stdout is no terminal, nothing."""
    if sys.stdout.isatty():
        plain = bool(os.environ.get("NO_COLOR"))
        console = Console(soft_wrap=True, color_system=None if plain else "auto")
        console.print(Text(text, style="dim"))
