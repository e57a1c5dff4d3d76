"""lowvram: fine-tune the largest model your GPU can hold, and know before you start."""

__version__ = "0.1.0"
