"""Training: one loop, its parts, and a thin script for each stage."""
