"""The model: language model, vision tower, image fusion and processor."""
