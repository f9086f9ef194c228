"""Training: the complexity of a model, and steering it in an unchanged training loop."""
