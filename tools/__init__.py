"""Tools for developers: measurements, and what writes pages and pictures of the documentation."""
