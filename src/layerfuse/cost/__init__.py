"""Parameters and FLOPs, counted without weights."""
