"""Chooses the fastest plan that fits, with its reasons."""
