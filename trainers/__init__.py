"""What runs: subclasses of nnU-Net's trainer."""
