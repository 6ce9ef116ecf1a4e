"""Read, clean and split labelled text."""
