"""Text to token ids and back (paper section 2.2, Tokenizer)."""
