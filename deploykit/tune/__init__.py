"""Find the best serving settings of a packaged model on this machine, and write them into its config."""
