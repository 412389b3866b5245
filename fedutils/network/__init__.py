"""The same clients and the same rounds over a real network, with Flower (extra `flower`)."""
