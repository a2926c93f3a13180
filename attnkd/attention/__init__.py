"""The divergence between two attentions: the operation and its implementations."""
