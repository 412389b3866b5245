"""What all rooms stand on: errors, files, randomness, states. It imports nothing of ours."""

__version__ = "0.1.0"
