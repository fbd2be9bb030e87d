"""Self-configuring self-supervised pretraining for nnU-Net."""

__version__ = "0.1.0"
