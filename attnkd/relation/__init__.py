"""The squared error between two relation rows: the operation and its implementations."""
