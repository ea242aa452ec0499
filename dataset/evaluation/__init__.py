"""What evaluation asks of data: control images, wrong captions, multiple choice."""
