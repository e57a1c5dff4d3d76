"""The adapter leaves as something people can run: merged safetensors, GGUF, Ollama, vLLM."""
