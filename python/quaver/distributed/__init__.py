"""Training over several processes: what is sent between them is FP8 where it can be."""
