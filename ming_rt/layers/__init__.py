"""Building blocks of the models: weights read from a ``WeightSource``, arithmetic from ``ming_rt.ops``."""
