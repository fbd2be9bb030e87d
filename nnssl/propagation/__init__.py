"""Segmentation by example: the labels of a few annotated cases carried to all others by the features of frozen weights."""
