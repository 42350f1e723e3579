"""DeepSeek-V2: the decoder of V2, V2-Lite, V2.5, Coder-V2 and the language models of VL2."""
