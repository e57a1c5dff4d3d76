"""The adapter leaves as something people can run: merged 16-bit safetensors."""
