"""Pretraining: one loop for all methods, one trainer class for each pretext stage."""
