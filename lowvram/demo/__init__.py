"""The demo: a small real model, a bundled data set, the whole pipeline."""
