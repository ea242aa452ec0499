"""The OpenAI protocol: what a connection may do, and for how long."""
