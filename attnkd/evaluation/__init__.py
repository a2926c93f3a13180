"""How good a trained model is: k-NN, linear probe, fine-tuning. The command line and the demo call it."""
