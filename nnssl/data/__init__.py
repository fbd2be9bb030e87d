"""Raw data sets, image files, preprocessing, the case store and the patch loader."""
