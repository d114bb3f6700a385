"""The runner's own networks, and torchvision's, by name."""

from bnexp.networks.build import MODELS, build_model

__all__ = ["MODELS", "build_model"]
