"""Label-efficiency studies: their table, statistics, words, figures and report."""
