"""The code that runs on a serving machine. It imports neither torch nor transformers."""
