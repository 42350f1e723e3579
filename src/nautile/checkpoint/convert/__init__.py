"""``nautile convert``: a checkpoint in another dtype, or cut for DeepSeek's demo code, without building a model."""
