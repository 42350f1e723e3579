"""Llama: the decoder of DeepSeek-LLM, DeepSeek-Coder and R1-Distill-Llama."""
