"""The low-memory step itself: model, adapters, loss and the one function that is trained, traced and timed."""
