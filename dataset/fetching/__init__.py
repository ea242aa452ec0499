"""Fetching real assets: hubs, the list of assets, the corpus."""
