"""Token classification for deploykit: a label for each word of a text."""
