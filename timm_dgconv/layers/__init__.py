"""Layers: dynamic grouping convolution."""
