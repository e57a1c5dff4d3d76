"""The low-memory step itself: model, adapters, loss and the one step that is trained, traced and timed."""
