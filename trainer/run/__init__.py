"""A run around the loop: its parts, the checks before, the report after."""
