"""Taking queries and keys out of a model, and knowing what its tokens are."""
