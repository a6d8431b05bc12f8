"""The losses of the vocabulary head."""
