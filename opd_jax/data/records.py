"""The unit of everything stored: one sampled response, and what a teacher said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Record:
    """One response to one prompt, as it was sampled.

    Attributes:
        prompt_id: the prompt's name; with `sample_index` it is the record's key.
        prompt_ids: int32 [p], the prompt as the sampler saw it.
        response_ids: int32 [t], the sampled end token included.
        student_logprob: float32 [t], log-prob of each response token under the model that
            drew it, temperature 1.
        finish_reason: `stop` when an end token was drawn, `length` when the limit cut the response.
        reward: the grader's verdict, NaN where nothing was graded.
    """

    prompt_id: str
    sample_index: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    student_logprob: np.ndarray
    finish_reason: FinishReason
    reward: float = float("nan")


@dataclass(frozen=True, eq=False)
class Scores:
    """A teacher's log-probs for one record's response.

    Attributes:
        logprob: float32 [t], of each sampled token.
        topk_ids: int32 [t, k], the teacher's most likely tokens, likeliest first; `None` when not
            stored.
        topk_logprob: float16 [t, k], their log-probs, normalised over the whole vocabulary.
        topk_rest: float32 [t], the probability of all other tokens together.
        entropy: float32 [t], of the teacher's whole distribution, nats; `None` when not stored.
    """

    logprob: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_logprob: np.ndarray | None = None
    topk_rest: np.ndarray | None = None
    entropy: np.ndarray | None = None


def blank_record(key: tuple[str, int], prompt_tokens: int, response_tokens: int) -> Record:
    """A record of these lengths, all zeros: in the place of one that another process reads."""
    prompt, response = np.zeros(prompt_tokens, np.int32), np.zeros(response_tokens, np.int32)
    return Record(*key, prompt, response, np.zeros(response_tokens, np.float32), "length")
