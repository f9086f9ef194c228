"""Layers: dynamic grouping convolution."""

from timm_dgconv.layers.dgconv import DGConv2d as DGConv2d
