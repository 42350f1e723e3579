"""Between characters and token ids: tokenizer, fill-in-the-middle, incremental decoding."""
