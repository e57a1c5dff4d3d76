"""Stand-in for Liger in tests: its interface, allocations and in-place gradients, computed by numpy."""
