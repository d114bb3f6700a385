"""A run's model and data as what `bnexp.evaluation` evaluates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from bnexp.condition import AVERAGED, Condition, Weights
from bnexp.config import Config
from bnexp.config.schema import AdaptedConfig
from bnexp.data import Data, Split
from bnexp.data.sampling import Share
from bnexp.evaluation.evaluate import Source, sources
from bnexp.evaluation.subject import Method, Subject
from bnexp.ranks import Alone, Ranks
from bnexp.statistics import Statistics, recompute_statistics
from bnexp.statistics.blend import blend
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
    batch statistics; with recomputed ones of the run's own weights those of test images, too."""
    settings = config.statistics.recompute
    found = sources(
        subject,
        estimates,
        methods=(methods or [settings.method]) if recompute else (),
        batch=batch,
        weights=weights,
        memory=settings.memory,
        progress=progress,
    )
    if recompute and estimates and weights not in AVERAGED:
        running = next(iter(estimates.values()))
        for name, adapted in config.statistics.adapted.items():
            source = partial(_adapted, subject, running, adapted, settings.memory)
            found[Condition(name, weights)] = source
    return found


def _adapted(
    subject: Subject, running: Statistics, settings: AdaptedConfig, memory: str | None
) -> Statistics:
    """Statistics of test images, pulled towards the running ones (`bnexp.blend`)."""
    images = _TestImages(subject, settings.samples)
    ranks = subject.ranks
    target = recompute_statistics(subject.model, images, method="exact", memory=memory, ranks=ranks)
    count = sum(ranks.gather(images.count, "the number of test images"))
    return blend(running, target, settings.prior, count)


@dataclass
class _TestImages:
    """The first `samples` test images, in batches; `count` of them in the latest pass."""

    subject: Subject
    samples: int | None
    count: int = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.count = 0
        for x, _ in self.subject.test(self.samples):
            self.count += len(x)
            yield x
