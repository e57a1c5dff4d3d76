"""Stand-in for liger_kernel.transformers."""
