"""Networks that a plan can name."""
