"""Tools for developers: measurements, and programs that write pages and pictures of the documentation."""
