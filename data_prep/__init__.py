"""Text to shards: the data stage of the distillation pipeline (CPU only, no torch)."""
