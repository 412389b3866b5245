"""From a folder as it is to the store: find, read, check, decode, split, partition."""
