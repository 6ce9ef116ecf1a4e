"""Bundles for NVIDIA Jetson: made on any machine (``bundle``), run on the device (``device``) by run.sh.

Code for the device imports only numpy, tokenizers and one engine: it has neither click nor tritonclient.
"""
