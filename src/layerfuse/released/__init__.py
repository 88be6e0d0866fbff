"""Checkpoints of the released code of other projects, read as layerfuse's models."""
