"""From labelled text to a model that answers in production."""

__version__ = "0.1.0"
