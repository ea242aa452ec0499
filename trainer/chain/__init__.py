"""The chain of demo.py on the sample world."""
