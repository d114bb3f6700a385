"""The YAML of a run: its schema, reading it, and explaining what is wrong with it."""

from bnexp.config.loading import load_config, resolve
from bnexp.config.schema import Config

__all__ = ["Config", "load_config", "resolve"]
