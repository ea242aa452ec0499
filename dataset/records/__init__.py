"""One reader over records and their images."""
