"""See inside a trained model: what an answer looked at, what each layer gave, what guides it."""
