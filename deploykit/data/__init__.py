"""Labelled text: read, clean, split."""
