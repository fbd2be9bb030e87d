"""From raw images to boxes of preprocessed voxels."""
