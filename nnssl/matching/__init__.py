"""Matching of places between scans: ``PointMatcher`` and two implementations."""
