"""From a data file to conversations, tokens with a loss mask, and statistics."""
