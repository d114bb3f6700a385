"""A run's model and data as what `bnexp.evaluation` evaluates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bnexp.condition import Condition, Weights
from bnexp.config import Config
from bnexp.data import Data, Split
from bnexp.data.sampling import Share
from bnexp.evaluation.evaluate import Source, sources
from bnexp.evaluation.subject import Method, Subject
from bnexp.ranks import Alone, Ranks
from bnexp.statistics import Statistics
from bnexp.statistics.progress import Progress

EXACT_CHUNK = 100


@dataclass(frozen=True)
class PopulationBatches:
    """The training images that population statistics are computed over, in batches."""

    split: Split
    batch_size: int
    samples: int
    augment: bool
    share: Share

    def __len__(self) -> int:
        """Of the whole pass; of several processes, each goes through about its share."""
        return -(-self.samples // self.batch_size // self.share.size)

    def __iter__(self):
        return self.split.batches(self.batch_size, self.samples, self.augment, self.share)


def run_subject(
    model: nn.Module,
    data: Data,
    config: Config,
    split: Split | None = None,
    ranks: Ranks = Alone(),
) -> Subject:
    """`model` on `split`, the test set if None. The population is `statistics.recompute`'s: the
    first `samples` of a fixed permutation of the training images. Each of the ranks takes whole
    batches of both."""
    test, share = split or data.test, Share(ranks.rank, ranks.size)

    def population(method: Method) -> PopulationBatches:
        settings = config.statistics.recompute
        samples = min(settings.samples or len(data.train), len(data.train))
        batch_size = settings.batch_size
        if batch_size is None:
            mini_batch = config.statistics.normalization_batch or config.training.batch_size
            batch_size = EXACT_CHUNK if method == "exact" else mini_batch
        if method != "exact" and samples % batch_size == 1:
            samples -= 1  # a last mini-batch of one image has no variance of its own
        return PopulationBatches(data.train, batch_size, samples, settings.augment, share)

    return Subject(
        model,
        population,
        lambda samples: test.batches(config.test.batch_size, samples=samples, share=share),
        tuple(data.info.classes),
        ranks,
    )


def run_sources(
    subject: Subject,
    estimates: Mapping[str, Statistics],
    config: Config,
    *,
    recompute: bool,
    batch: bool = False,
    weights: Weights = "trained",
    methods: Sequence[Method] = (),
    progress: Progress = False,
) -> dict[Condition, Source]:
    """The online `estimates` and, if asked for, recomputed (by `methods`, else the config's) and
    batch statistics."""
    settings = config.statistics.recompute
    return sources(
        subject,
        estimates,
        methods=(methods or [settings.method]) if recompute else (),
        batch=batch,
        weights=weights,
        memory=settings.memory,
        progress=progress,
    )
