"""Segmentation quality: metrics, classes, segmentation files, summaries and the linear probe."""
