"""DeepSeekMoE-16B: multi-head attention and a mixture of fine-grained experts."""
