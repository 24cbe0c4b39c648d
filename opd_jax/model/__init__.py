"""The decoder, and its exchange with Hugging Face folders and GGUF files."""
