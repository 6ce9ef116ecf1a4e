"""Pairs of texts in two languages: read, clean, split."""

from deploykit.data.clean_pairs import PairCleaningReport, clean_pairs
from deploykit.data.pairs import Pair, PairColumns, RawPair, one_line
from deploykit.data.read_pairs import load_pairs, read_sources
from deploykit.data.split_pairs import drop_pair_leaks, split_pairs

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
