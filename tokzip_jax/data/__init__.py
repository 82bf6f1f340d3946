"""Data: sources (TFDS builders and files), the tokenizer, rows of tokens, and the Grain pipeline."""
