"""Find the settings that serve a packaged model best on this machine, and write them into its config."""
