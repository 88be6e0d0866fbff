"""Ask a trained model, score its answers, say what the scores may claim."""
