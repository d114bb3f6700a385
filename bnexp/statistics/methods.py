"""The ways of recomputing population statistics, by name; `recompute_statistics` defines them."""

from typing import Literal

Method = Literal["exact", "pooled", "batch-mean"]
