"""Fingerprint, presets and planners: everything that the data determine before pretraining starts."""
