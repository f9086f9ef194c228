"""The operator: dynamic grouping convolution, its mathematics, and its gradients. README.md has the derivation."""
