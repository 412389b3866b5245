"""Training a run: arms, replicas, rounds one after the other, checkpoints, cached features."""
