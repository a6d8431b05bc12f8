"""Batch scripts for SLURM: plain bash that a person can read, rendered from templates and the facts of one site."""
