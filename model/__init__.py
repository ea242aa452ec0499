"""The model: language model, vision tower, fusion, processor, weights and inference."""
