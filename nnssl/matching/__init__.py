"""Where a place of one scan lies in another: ``PointMatcher`` and two ways of finding it."""
