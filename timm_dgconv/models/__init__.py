"""Models: G-ResNet and G-ResNeXt, any other network with DGConv2d layers, and the compact form."""

# Importing any module of this package registers the models first, so timm and this package can import each other.
from timm_dgconv.models import g_densenet as g_densenet
from timm_dgconv.models import g_resnet as g_resnet
