"""NVIDIA's Triton container for packaged models: Dockerfile, compose.yaml and its health check."""
