"""Bundles for NVIDIA Jetson: made on any machine (``bundle``), run on the device (``device``) by run.sh.

What the device runs imports numpy, tokenizers and one engine: neither click nor tritonclient is there.
"""
