"""Run several decoders in parallel, each in its own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait
from typing import TYPE_CHECKING

from deploykit.runtime.decoding.sentence import Sentence

if TYPE_CHECKING:
    from deploykit.runtime.decoding.decoder import Decoder


def run_side_by_side(
    decoders: Sequence[Decoder],
    first: Sequence[Sentence],
    coming: Iterator[Sentence],
    finish: Callable[[Sentence], None],
    *,
    most: int,
    pool: Executor,
) -> None:
    """Distribute the ``first`` sentences to ``decoders``, and decode these and the ``coming`` sentences in threads of ``pool``.

    A decoder takes a coming sentence while its own sentences need fewer than ``most`` rows.
    """
    for i, sentence in enumerate(first):
        decoders[i % len(decoders)].add(sentence)
    taking, failed = threading.Lock(), False

    def work(decoder: Decoder) -> None:
        nonlocal failed
        try:
            while decoder.waiting or decoder.running:
                done = decoder.step()
                with taking, decoder.seconds.counting("tokenizing"):
                    while not failed and decoder.claimed < most and (sentence := next(coming, None)):
                        decoder.add(sentence)
                with decoder.seconds.counting("detokenizing"):
                    for sentence in done:
                        finish(sentence)
        except BaseException:
            failed = True  # stops the other decoders
            raise

    futures = [pool.submit(work, decoder) for decoder in decoders]
    try:
        for future in futures:
            future.result()
    except BaseException:
        failed = True
        wait(futures)
        raise
