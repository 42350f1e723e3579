"""Published Hugging Face folders in and out: layouts, streaming safetensors."""
