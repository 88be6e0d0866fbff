"""Visual Spatial Reasoning as a task of lmms-eval."""
