"""Recognize by its message why Triton, or a model, refused a request: errors within a stream have no code."""

from __future__ import annotations

import re

_STATES = r"is not healthy|unknown model|is not found|no available versions|is not ready|unloaded"
QUEUE_FULL = re.compile(r"Exceeds maximum queue size|the queue is full$")
RELOADING = re.compile(rf"{_STATES}|UNAVAILABLE|Failed to retrieve the response error")
"""Part of a message while a model whose process died is loaded again, or when Triton cannot read its answer."""
ONLY_RELOADING = re.compile(rf"(Stub process|Request for|Model|Server)\b.*({_STATES})")
"""Beginning of such a message; an error that quotes a text does not begin like this."""
CONTEXT_HOLDS = "the model's context holds"
"""Part of the message for a prompt that is too long."""
