"""Say which words of a text a model's answer comes from. Numpy alone: it works for any model that can be asked."""
