"""Measure throughput, latency, memory and accuracy of one model or of several side by side."""
