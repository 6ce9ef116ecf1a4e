"""Find the words of a text that led to a model's answer, with numpy only, for any model that can answer texts."""
