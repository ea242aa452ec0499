"""What `trainer/benchmark.py` measures: ordinary training, and a plain loop to compare it with."""
