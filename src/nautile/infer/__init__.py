"""Text from a trained model: the latent cache, sampling, and the generation loop behind `nautile.LLM`."""
