"""The sample world: scenes, drawings, texts, records."""
