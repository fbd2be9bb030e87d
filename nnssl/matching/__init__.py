"""Where a place of one scan lies in another: ``PointMatcher`` and its two ways, and pairs of patches that follow from it."""
