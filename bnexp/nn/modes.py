"""What a model's BN layers normalize with in training: ghost batches, the samples of several
processes, or frozen statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import nn

from bnexp.errors import UserError
from bnexp.nn.batchnorm import Across, TrackedBatchNorm
from bnexp.nn.convert import followed_layers
from bnexp.torch_internals import is_lazy

if TYPE_CHECKING:
    from bnexp.statistics import Statistics

Model = TypeVar("Model", bound=nn.Module)


def set_normalization_batch(model: Model, size: int | None) -> Model:
    """Ghost batches: in training, normalize over consecutive sub-batches of `size` samples.

    Each BN layer splits its input (N, C, ...) along N into parts of `size` samples, the last one
    possibly smaller, and normalizes every part with the part's own statistics (Hoffer et al.
    2017, "ghost batch normalization"; "normalization batch" in Wu & Johnson 2021, section 3).
    Bit-identical to concatenating what a `torch.nn` layer returns for each part. Inference is
    untouched, and so are batches of up to `size` samples; None switches it off.

    Running buffers and estimators get one update per mini-batch, with the mean over the parts of
    the parts' means and unbiased variances: what networks with such small batches would have
    stored on average. All parts weigh the same. `Pooled` then has the variance between
    mini-batches in it, but not the variance between the parts of one.

    Mutates the layers of `model`, `torch.nn`'s and subclasses of these being converted in place;
    returns `model`.

    Raises:
        UserError: here, if `size` is not a positive integer or a layer is a `SyncBatchNorm`
            (nothing has changed then); in the forward pass, if a part leaves a layer with a
            single value per channel, or a subclass with a forward of its own never calls
            `F.batch_norm`.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise UserError(f"a normalization batch is a positive number of samples, not {size!r}")
    for layer in followed_layers(model).values():
        layer.normalization_batch = size
    return model


def normalize_across(model: Model, across: Across | None) -> Model:
    """In training, normalize over mini-batches whose samples lie in several processes.

    Every BN layer hands its input to `across` (see `bnexp.statistics.across.AcrossRanks`), and its
    running buffers and estimators get the statistics of the whole mini-batch, alike in all
    processes. Inference is untouched; None switches it off. It takes the place of ghost batches.

    Mutates the layers of `model`, `torch.nn`'s and subclasses of these being converted in place;
    returns `model`. Raises UserError if a layer is a `SyncBatchNorm`; nothing has changed then.
    """
    for layer in followed_layers(model).values():
        layer.across = across
    return model


def freeze_batchnorm(model: Model, statistics: Statistics | None = None) -> Model:
    """FrozenBN: from now on normalize with fixed statistics, in training mode too.

    The running buffers serve as the fixed statistics; `statistics`, if given, are copied into
    them first. The layers then compute `weight · (x - mean) / sqrt(var + eps) + bias` in both
    modes, the gradient is that of this affine function, weight and bias keep learning, and
    neither buffers nor estimators are updated (Wu & Johnson 2021, section 3.3). `model.train()`
    does not unfreeze; `unfreeze_batchnorm` does. Layers that keep no running statistics are
    refused.

    Mutates the layers of `model`, `torch.nn`'s and subclasses of these being converted in place;
    returns `model`.

    Raises:
        UserError: if a layer keeps no running statistics or is a `SyncBatchNorm`, or if
            `statistics` are not of this model. No layer has been frozen then.
    """
    layers = followed_layers(model)
    for name, layer in layers.items():
        if layer.running_mean is None or is_lazy(layer.running_mean):
            raise UserError(
                f"layer {name!r} has no running statistics to freeze: build it with "
                "track_running_stats=True, and run lazy layers once"
            )
    if statistics is not None:
        statistics.copy_to(model)
    for layer in layers.values():
        layer.frozen = True
    return model


def unfreeze_batchnorm(model: Model) -> Model:
    """Undo `freeze_batchnorm`; the buffers keep their values. Mutates and returns `model`."""
    for layer in model.modules():
        if isinstance(layer, TrackedBatchNorm):
            layer.frozen = False
    return model
