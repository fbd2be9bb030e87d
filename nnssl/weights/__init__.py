"""Checkpoints of pretraining, opened."""
