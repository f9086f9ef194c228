"""Training: the complexity of a model, and steering it in an unchanged training loop."""

# Importing timm registers the models, and they import these modules. So timm comes first, while none is half imported.
import timm.models as _models  # noqa: F401
