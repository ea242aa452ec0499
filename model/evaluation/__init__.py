"""Scores: likelihood, statistics, text metrics, reports."""
