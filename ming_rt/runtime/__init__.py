"""Everything between a loaded checkpoint and an answer: weights, cache, scheduler, engine."""
