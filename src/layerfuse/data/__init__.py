"""Samples from files, datasets and generated scenes, and the cache of their features."""
