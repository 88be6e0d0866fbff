"""Which layers to read, and the encoder that reads them."""
