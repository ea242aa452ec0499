"""The OpenAI protocol itself: from JSON to requests that are checked, from answers to JSON."""
