"""The main job: plan, check, run and report every arm of a recipe."""
