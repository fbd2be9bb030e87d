"""Does pretraining help: metrics, probes, benchmarks and reports."""
