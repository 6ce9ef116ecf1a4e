import pytest

from deploykit.metric_titles import title_of


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("macro_f1", "macro-F1"),
        ("micro_f1", "micro-F1"),
        ("per_class.spam.f1", "F1 of spam"),
        ("per_class.not.spam.precision", "precision of not.spam"),
        ("no_answer.exact_match", "exact match, no answer"),
    ],
)
def test_titles_are_words(metric: str, title: str) -> None:
    assert title_of(metric) == title
