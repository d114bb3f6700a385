"""Images on the training device: which data sets there are, and the batches they yield."""

from bnexp.data.catalogue import DATA_SETS, load_data
from bnexp.data.settings import Augmentation, DataSettings
from bnexp.data.split import Data, DataInfo, Split

__all__ = ["DATA_SETS", "Augmentation", "Data", "DataInfo", "DataSettings", "Split", "load_data"]
