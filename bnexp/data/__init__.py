"""Images on the training device: which data sets there are, and the batches they yield.

`bnexp.data.overview` answers without torch; the names below import it when they are used first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnexp.data.catalogue import DATA_SETS, load_data
    from bnexp.data.settings import Augmentation, DataSettings
    from bnexp.data.split import Data, DataInfo, Split

_HOME = {
    "DATA_SETS": "catalogue",
    "load_data": "catalogue",
    "Augmentation": "settings",
    "DataSettings": "settings",
    "Data": "split",
    "DataInfo": "split",
    "Split": "split",
}

__all__ = ["DATA_SETS", "Augmentation", "Data", "DataInfo", "DataSettings", "Split", "load_data"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'bnexp.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"bnexp.data.{_HOME[name]}"), name)
    globals()[name] = value
    return value
