"""Networks that a plan can name, and the heads that pretext methods add to them."""
