"""Owns the chain that demo.py runs on the sample world: settings, steps, report."""
