"""The web page: what its server takes, keeps and refuses."""
