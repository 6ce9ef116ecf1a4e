"""The code that runs on a serving machine: text in, answer out. It imports neither torch nor transformers."""
