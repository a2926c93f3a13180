"""What a frozen backbone's features are worth: k-NN and linear probe. The command line and the demo call it."""
