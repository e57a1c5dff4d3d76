"""Stand-in for Triton in tests: the real one is 286 MB; scripts/check_liger.py runs that."""
