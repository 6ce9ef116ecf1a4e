"""Which settings serve a packaged model best on this machine: measured, explained, and written into its config."""
