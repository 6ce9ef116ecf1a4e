"""Text in, answer out: everything a serving machine runs. Imports neither torch nor transformers."""
