"""Predicts a step's peak memory by running the engine's own step on meta tensors."""
