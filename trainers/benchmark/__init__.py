"""The label-efficiency study of ``nnssl_benchmark``: does pretraining help on a labelled data set?"""
