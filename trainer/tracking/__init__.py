"""Figures of a run: metrics, trackers, curves."""
