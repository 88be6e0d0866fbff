"""Look at an encoder before training: similarity, groups, probes, recommendation."""
