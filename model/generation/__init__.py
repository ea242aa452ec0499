"""Answers: sampling, decoding, the engine, where it looks."""
