"""See inside one answer: what a model looked at, and what each layer gave to it."""
