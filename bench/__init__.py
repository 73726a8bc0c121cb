"""Benchmarks of ming_rt: every op and the whole thinker against plain torch compositions in one run."""
