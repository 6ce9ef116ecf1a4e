"""Label words with a model on a running server, through the same interface as in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploykit.errors import UsageError
from deploykit.runtime.served import DEFAULT_URL, ServedModel, require_all
from token_classification.facts import TokenClassification


class ServedTagger(ServedModel):
    """The token classifier ``name`` on the Triton server at ``url``. Options as for every served model."""

    def __init__(self, name: str, url: str = DEFAULT_URL, **options: Any) -> None:
        super().__init__(name, url, **options)
        if not isinstance(self.facts, TokenClassification):
            self.close()
            raise UsageError(f"{name} does not label words", "use deploykit predict")
        self.task: TokenClassification = self.facts

    def tag(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the labels of each text's words. Raises RequestError if any text has none."""

        def infer(chunk: list[bytes]) -> list[tuple[str, str]]:
            labels, errors = self._infer({"TEXT": chunk}, ("LABELS", "ERROR"))
            return [(a.decode(), b.decode()) for a, b in zip(labels.reshape(-1), errors.reshape(-1))]

        rows = self._rows(texts, infer, lambda error: ("", error))
        require_all([error for _, error in rows])
        return [labels.split() for labels, _ in rows]
