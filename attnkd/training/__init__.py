"""Training runs: configuration, named recipes, data, the loop, checkpoints. The command line and the demo call it."""
