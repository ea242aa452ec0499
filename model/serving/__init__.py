"""Ways to use a model: terminal chat, web page, API server."""
