"""Does pretraining help on these data: the label-efficiency study of ``nnssl_benchmark``."""
