"""Train one arm: its stages, its learning rates, its checkpoints."""
