"""Does pretraining help: metrics, statistics, probes, pictures and the report."""
