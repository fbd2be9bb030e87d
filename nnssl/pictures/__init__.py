"""Pictures of what pretrained weights know, made without labels."""
