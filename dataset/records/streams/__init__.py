"""Records of shards that are not on this machine."""
