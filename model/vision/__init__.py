"""Pictures: reading, preprocessing, projecting them, and keeping what a tower says of them."""
