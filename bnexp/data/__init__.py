"""Images on the training device: which data sets there are, and the batches they yield."""

from bnexp.data.catalogue import DATA_SETS, load_data
from bnexp.data.split import Data, DataInfo, Split

__all__ = ["DATA_SETS", "Data", "DataInfo", "Split", "load_data"]
