"""The visible training loop on accelerate, its run folder, checkpoints and live view."""
