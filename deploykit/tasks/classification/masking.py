"""Replace words of texts by words that a masked language model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch

from deploykit.data.synonyms import with_words, words_of
from deploykit.errors import ArtifactError, UsageError
from deploykit.training.checkpoint import load_config, load_tokenizer, max_tokens
from deploykit.training.weights import load_reported

_LOGITS_AT_ONCE = 1 << 26
"""256 MB in fp32."""
_LIKELIEST = 20
"""Number of likeliest tokens from which a word is sampled, if it is a whole word and differs from the original."""
_STARTS = ("Ġ", "▁")
"""Markers of a token that begins a word, in the vocabularies of byte-level BPE and SentencePiece."""


class MaskedWords:
    """A masked language model: a checkpoint's folder or a hub id."""

    def __init__(self, checkpoint: str) -> None:
        """Raise UsageError if the checkpoint has no head of a masked language model."""
        remedy = "name a masked language model: --mask-model DIR or a hub id, such as distilbert/distilroberta-base"
        self._tokenizer = load_tokenizer(checkpoint)
        config = load_config(checkpoint)
        try:
            loaded = load_reported("AutoModelForMaskedLM", checkpoint, config, new_head=True)
        except ArtifactError as error:
            raise UsageError(f"--augment mask: {error.message}", remedy) from error
        if loaded.new or self._tokenizer.mask_token is None:
            raise UsageError(f"--augment mask: {checkpoint} is not a masked language model", remedy)
        self._model = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._limit = max_tokens(self._tokenizer, config)
        vocabulary = self._tokenizer.get_vocab()
        self._start = next((start for start in _STARTS if any(token.startswith(start) for token in vocabulary)), "")
        self._words: dict[int, str] = {}

    def rewrite(self, texts: Sequence[str], rate: float, random: Random) -> list[str]:
        """Replace this share of the words of each text; the model reads each text once, with all these words masked."""
        found = list(texts)
        longest_first = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        first = 0
        while first < len(texts):
            longest = min(len(texts[longest_first[first]]) + 2, self._limit)  # a token has a character at least
            rows = max(1, _LOGITS_AT_ONCE // (longest * self._model.config.vocab_size))
            numbers = longest_first[first : first + rows]
            first += rows
            for number, text in zip(numbers, self._some([texts[i] for i in numbers], rate, random)):
                found[number] = text
        return found

    def _some(self, texts: Sequence[str], rate: float, random: Random) -> list[str]:
        mask = self._tokenizer.mask_token
        chosen = [
            [word for word in words_of(text) if random.random() < rate] if mask not in text else [] for text in texts
        ]
        masked = []
        for text, words in zip(texts, chosen):
            ends = [0, *(word.end() for word in words)]
            starts = [*(word.start() for word in words), len(text)]
            masked.append(mask.join(text[end:start] for end, start in zip(ends, starts)))
        batch = self._tokenizer(masked, padding=True, truncation=True, max_length=self._limit, return_tensors="pt").to(
            self._model.device
        )
        places = batch["input_ids"] == self._tokenizer.mask_token_id
        with torch.inference_mode():
            scores, tokens = self._model(**batch).logits[places].float().softmax(dim=-1).topk(_LIKELIEST)
        rows = places.nonzero()[:, 0].tolist()
        # Words beyond the longest input stay unchanged.
        offered = [[i for i, row in enumerate(rows) if row == number] for number in range(len(texts))]
        found = []
        for text, words, own in zip(texts, chosen, offered):
            replaced = [
                (word, self._drawn(word.group(), scores[i].tolist(), tokens[i].tolist(), random))
                for word, i in zip(words, own)
            ]
            found.append(with_words(text, replaced))
        return found

    def _drawn(self, word: str, scores: Sequence[float], tokens: Sequence[int], random: Random) -> str:
        """Return another word, sampled by its probability, or the same word if no other is likely."""
        offers = [(self._word(token), score) for token, score in zip(tokens, scores)]
        offers = [(other, score) for other, score in offers if score and other and other.lower() != word.lower()]
        if not offers:
            return word
        [other] = random.choices([other for other, _ in offers], [score for _, score in offers])
        return other

    def _word(self, token: int) -> str:
        """Return the word that a token is, or "" if it is part of one, a number or a mark."""
        if token not in self._words:
            whole = self._tokenizer.convert_ids_to_tokens(token).startswith(self._start)
            word = self._tokenizer.decode([token]).strip()
            self._words[token] = word if whole and word.isalnum() and not word.isdigit() else ""
        return self._words[token]
