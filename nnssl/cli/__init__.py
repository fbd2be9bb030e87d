"""The commands: thin argparse wrappers around the Python API."""
