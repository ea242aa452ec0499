"""Features of the frozen vision tower, computed once and kept in files."""
