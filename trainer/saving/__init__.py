"""What a run saves, and what guards it."""
