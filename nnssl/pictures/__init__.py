"""Pictures of what pretrained weights have learned, made without labels."""
