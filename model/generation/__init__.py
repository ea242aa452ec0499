"""Generating answers: sampling, decoding, context, the engine, attention maps."""
