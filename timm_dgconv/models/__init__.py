"""Models: G-ResNeXt, and its compact form."""

# Importing any module of this package registers the models first, so timm and this package can import each other.
from timm_dgconv.models import g_resnext as g_resnext
