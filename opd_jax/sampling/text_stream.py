"""The text of one response while it is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import OnTokens
from opd_jax.sampling.slots import Sample
from opd_jax.sampling.stops import Text, settled_text, shown_text


class TextStream(Iterator[str]):
    """Pieces of a response's text; put together they are the text of its sample.

    What further tokens can still change is held back: an unfinished character, and the beginning of
    a stop string. Dropping the stream ends the response.

    Attributes:
        token_ids: int32 [n], drawn so far.
        sample: the whole response, once the pieces are at their end.
    """

    def __init__(
        self,
        begin: Callable[[OnTokens], Iterator[list[Sample]]],
        text: Text,
        stops: Sequence[str],
    ) -> None:
        self.token_ids = np.zeros(0, np.int32)
        self.sample: Sample | None = None
        self._text, self._stops = text, stops
        self._pieces = self._read(begin(self._note))

    def __next__(self) -> str:
        return next(self._pieces)

    def _note(self, _: Request, token_ids: np.ndarray) -> None:
        self.token_ids = token_ids.copy()

    def _read(self, rounds: Iterator[list[Sample]]) -> Iterator[str]:
        said = 0
        for finished in rounds:
            if finished:
                self.sample = with_shown_text(finished[0], self._stops, self._text)
                self.token_ids, text = self.sample.token_ids, self.sample.text or ""
            else:
                text = settled_text(self.token_ids.tolist(), self._stops, self._text)
            if len(text) > said:
                yield text[said:]
                said = len(text)


def with_shown_text(sample: Sample, stops: Sequence[str], text: Text) -> Sample:
    """A sample whose text ends before the stop string that ended it."""
    return dataclasses.replace(sample, text=shown_text(sample.token_ids.tolist(), stops, text))
