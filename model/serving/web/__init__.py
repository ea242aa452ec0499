"""The web page: its parts, its server, its visitors' conversations and uploads."""
