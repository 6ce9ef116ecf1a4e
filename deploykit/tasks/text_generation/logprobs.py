"""Log-probabilities of tokens, before any rule of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.finite import check_highest
from deploykit.runtime.token_distribution import top_tokens
from deploykit.tasks.text_generation.encode import ChatTokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability before any rule of sampling, and those of the likeliest tokens, most likely first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def record(self, tokenizer: ChatTokenizer) -> dict[str, Any]:
        """Return it as JSON: ``token`` (text), ``token_id``, ``bytes``, ``logprob``, and the same of each in ``top``."""
        top = [_token_record(tokenizer, token, logprob) for token, logprob in self.top]
        return {**_token_record(tokenizer, self.token, self.logprob), "top": top}


def _token_record(tokenizer: ChatTokenizer, token: int, logprob: float) -> dict[str, Any]:
    text, data = tokenizer.text_decoder.single(token)
    return {"token": text, "token_id": token, "bytes": list(data), "logprob": round(logprob, 6)}


def token_logprob(token: int, logits: NDArray[np.float32], top: int) -> TokenLogprob:
    """Return the log-probability of ``token`` by ``logits``, [vocabulary], and of the ``top`` likeliest tokens.

    Raises NoNumberError if a logit is NaN, or the highest infinite.
    """
    check_highest(logits)
    total = log_sum(logits)
    best = top_tokens(logits, top).tolist() if top else []
    return TokenLogprob(token, float(logits[token] - total), tuple((i, float(logits[i] - total)) for i in best))


def log_sum(logits: NDArray[np.float32]) -> Any:
    """Return log(sum(exp(logits))) over the last axis, float64 [...]; NaN where the highest is infinite."""
    most = logits.max(-1)
    with np.errstate(invalid="ignore"):
        return most + np.log(np.exp((logits - most[..., None]).astype(np.float64)).sum(-1))
