"""Using a model: chat, page and server."""
