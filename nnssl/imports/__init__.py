"""Import of existing images as raw nnU-Net data sets, from folders, BIDS trees, lists, collections and DICOM files."""
