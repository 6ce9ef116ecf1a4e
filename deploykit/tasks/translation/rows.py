"""Pairs of texts in two languages: read, clean, split."""

from deploykit.tasks.translation.clean_pairs import PairCleaningReport, clean_pairs
from deploykit.tasks.translation.pairs import Pair, PairColumns, RawPair, one_line
from deploykit.tasks.translation.read_pairs import load_pairs, read_sources
from deploykit.tasks.translation.split_pairs import drop_pair_leaks, split_pairs

__all__ = [
    "Pair",
    "PairCleaningReport",
    "PairColumns",
    "RawPair",
    "clean_pairs",
    "drop_pair_leaks",
    "load_pairs",
    "one_line",
    "read_sources",
    "split_pairs",
]
