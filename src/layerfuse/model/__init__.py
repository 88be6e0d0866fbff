"""The multimodal LLM: an ordinary Hugging Face model and its processor."""
