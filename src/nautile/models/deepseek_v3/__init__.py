"""DeepSeek-V3: the decoder of V3, R1 and V3.1."""
