"""Pretrained models for machines without a model hub."""
