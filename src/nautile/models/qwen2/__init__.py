"""Qwen2: the decoder of R1-Distill-Qwen."""
