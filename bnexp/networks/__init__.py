"""The runner's own networks, and torchvision's, by name."""

from bnexp.networks.build import build_model
from bnexp.networks.own import MODELS

__all__ = ["MODELS", "build_model"]
