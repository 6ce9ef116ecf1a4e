"""Decode sentences in a running batch, which sentences join and leave between steps.

A step feeds every running row its last token. Waiting sentences join as soon as there is room, and finished ones leave
immediately, so no row is wasted. A sentence's tokens and score do not depend on the other rows of the batch.
"""

from deploykit.runtime.decoding.decoder import MAX_CACHE_BYTES, Decoder
from deploykit.runtime.decoding.sentence import Seconds, Sentence, longest_first

__all__ = ["MAX_CACHE_BYTES", "Decoder", "Seconds", "Sentence", "longest_first"]
