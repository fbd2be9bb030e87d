"""Pretrained weights: opened safely, fitted to another network, and written for nnU-Net, a model hub or plain PyTorch."""
