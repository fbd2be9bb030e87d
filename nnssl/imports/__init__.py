"""Images as users have them, made into raw data sets of nnU-Net: folders, BIDS trees, lists, collections and DICOM files."""
