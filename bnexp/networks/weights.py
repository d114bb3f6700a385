"""Opening the user's weights, in whatever shape people save them, and writing them again.

What is read is a mapping of names to tensors somewhere in a file. Names in the file and names in
the model may differ by wrappers (`module.` of DataParallel and AveragedModel, `_orig_mod.` of
torch.compile) and by a prefix of either (`model.` of a LightningModule).
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnexp.atomic import write_atomically
from bnexp.errors import UserError
from bnexp.nn.find import batchnorm_layers
from bnexp.statistics.statistics import Statistics, check_range
from bnexp.tensor_files import load_tensors

# Where several mappings fit a model equally well, the first of these is taken: the weights that
# were trained before averages of them.
PREFERRED = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights")
WRAPPERS = ("_orig_mod", "module")
DEPTH = 3
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights: all its content, and the metadata of a safetensors file."""

    path: Path
    content: Any
    metadata: dict[str, str] | None = None

    @property
    def is_safetensors(self) -> bool:
        return self.path.suffix == ".safetensors"


@dataclass(frozen=True)
class Match:
    """Which tensors of a checkpoint are the model's.

    key: where in the file the mapping lies, dotted; "" for the file itself.
    names: name in the model -> name in the mapping.
    missing, unexpected: names of the model, and of the file, without a counterpart.
    misshapen: name in the model -> (shape in the file, shape in the model).
    missing_buffers: BN layers whose running statistics the file lacks.
    others: keys of the file's other mappings that would fit as well.
    tied: name in the model of a BN layer's buffer -> its further names there, where a layer has
        several places.
    """

    key: str
    names: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    missing_buffers: tuple[str, ...]
    others: tuple[str, ...]
    tied: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        where = f"under {self.key!r}" if self.key else "at the top of the file"
        text = f"{len(self.names)} tensors {where}"
        if self.others:
            text += f" (also there: {', '.join(self.others)}; --key chooses)"
        if self.unexpected:
            text += f"; not in the model: {_listed(self.unexpected)}"
        return text


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of weights onto the CPU. No code from the file can run.

    Files of `torch.save`, read with `weights_only=True` (plain data, numpy scalars and argparse
    namespaces allowed), and of safetensors. Raises UserError for a file that is missing, damaged,
    or needs more than that.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"weights: {path} is a folder: name the file in it")
    if not path.is_file():
        raise UserError(f"weights: there is no file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_scalars()]):
            return Checkpoint(path, load_tensors(path, strict=False))
    except OSError as error:
        raise UserError(f"weights {path}: {error.strerror or error}") from None
    except Exception as error:  # torch.load raises whatever its input leads it to
        needs = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.[\w.]+)", str(error))
        if needs is None:
            raise UserError(
                f"weights {path} can't be read: damaged, or not written by torch.save"
            ) from error
        raise UserError(
            f"weights {path} hold more than tensors ({needs[1]}), and reading that could run any "
            "code: where you trust the file, load it in Python and save the weights alone, "
            "torch.save(model.state_dict(), 'weights.pt')"
        ) from error


def match(checkpoint: Checkpoint, model: nn.Module, key: str | None = None) -> Match:
    """Find the model's tensors in the checkpoint: the mapping, and the names, that fit best.

    `key` decides which mapping it is. Raises UserError if there is no such mapping or none at all.
    """
    found = dict(mappings(checkpoint.content))
    if not found:
        raise UserError(f"weights {checkpoint.path} hold no mapping of names to tensors")
    if key is not None and key not in found:
        there = ", ".join(repr(k) for k in found)
        raise UserError(f"weights {checkpoint.path} have no tensors under {key!r}; there: {there}")
    wanted = _tensors(model)
    fits = {k: _fit(found[k], wanted) for k in ([key] if key is not None else found)}
    most = max(len(names) for names in fits.values())
    best = [k for k, names in fits.items() if len(names) == most and most]
    chosen = min(best or fits, key=_preference)
    state, names = found[chosen], fits[chosen]
    misshapen = {
        name: (tuple(state[theirs].shape), tuple(wanted[name].shape))
        for name, theirs in names.items()
        if state[theirs].shape != wanted[name].shape
    }
    layers = batchnorm_layers(model)
    buffers = {f"{layer}.{b}" if layer else b for layer in layers for b in BUFFERS}
    absent = [name for name in wanted if name not in names]
    taken = set(names.values())
    return Match(
        key=chosen,
        names=names,
        missing=tuple(name for name in absent if name not in buffers),
        unexpected=tuple(
            name
            for name in state
            if name not in taken and name.rpartition(".")[2] not in ("n_averaged", BUFFERS[2])
        ),
        misshapen=misshapen,
        missing_buffers=tuple(
            layer
            for layer in layers
            if any((f"{layer}.{b}" if layer else b) in absent for b in BUFFERS[:2])
        ),
        others=tuple(k for k in best if k != chosen),
        tied={
            name: tuple(n for n in names if n != name and wanted[n] is wanted[name])
            for name in names
            if name in buffers
        },
    )


@torch.no_grad()
def load_weights(checkpoint: Checkpoint, model: nn.Module, found: Match) -> None:
    """Copy the tensors that were found into the model.

    BN buffers that the file lacks keep the values they have (the match names their layers). Raises
    UserError, before anything is changed, if other tensors are missing, don't have the model's
    shapes, or are whole numbers, sparse, or negative variances: a model half of whose weights are
    random can't be judged.
    """
    where = f"weights {checkpoint.path}" + (f" under {found.key!r}" if found.key else "")
    if found.misshapen:
        shapes = [f"{n} {file} for {here}" for n, (file, here) in found.misshapen.items()]
        raise UserError(
            f"{where} have other shapes than the model: {_listed(shapes)}; say how the model is "
            "built with model.arguments"
        )
    if found.missing:
        unexpected = f"; the file has {_listed(found.unexpected)}" if found.unexpected else ""
        raise UserError(f"{where} lack {_listed(found.missing)}{unexpected}")
    state = dict(mappings(checkpoint.content))[found.key]
    wanted = _tensors(model)
    others = [
        f"{name} {str(state[theirs].dtype).removeprefix('torch.')}"
        for name, theirs in found.names.items()
        if state[theirs].layout != torch.strided
        or (wanted[name].is_floating_point() and not state[theirs].is_floating_point())
    ]
    if others:
        raise UserError(
            f"{where} are not what the model computes with: {_listed(others)}; save them as plain "
            "floating-point tensors"
        )
    negative = [
        name
        for name, theirs in found.names.items()
        if name.rpartition(".")[2] == BUFFERS[1] and (state[theirs].double() < 0).any()
    ]
    if negative:
        raise UserError(f"{where} have negative variances: {_listed(negative)}")
    for name, theirs in found.names.items():
        wanted[name].copy_(state[theirs])


def number_of_classes(found: Match) -> int | None:
    """What `num_classes` the file's tensors were made for, if that is all that is misshapen."""
    rows = {(file[0], here[0], file[1:] == here[1:]) for file, here in found.misshapen.values()}
    if len(rows) == 1 and not found.missing:
        classes, _, same = rows.pop()
        return classes if same else None
    return None


def write_mended(checkpoint: Checkpoint, found: Match, statistics: Statistics, out: Path) -> None:
    """Write the checkpoint again with these running statistics; nothing else in it changes.

    The structure, the names, all other tensors, their dtypes and what shares memory are the file's.
    Running statistics it lacks are added beside the layer's other tensors. Tensors are written as
    lying on the CPU. Mutates nothing. Raises UserError if `out` exists, a layer isn't in the file,
    or its dtype can't hold a statistic.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists: name a file that doesn't; nothing is ever overwritten")
    if not out.parent.is_dir():
        raise UserError(f"{out} can't be written: there is no folder {out.parent}")
    state = _at(checkpoint.content, found.key)
    changes: dict[str, Tensor] = {}
    for layer in statistics.names:
        for buffer, values in zip(
            BUFFERS[:2], (statistics.mean[layer], statistics.var[layer]), strict=True
        ):
            theirs, like = _name_in_file(found, layer, buffer)
            check_range(f"{buffer} of BN layer {layer!r}", values, state[like].dtype)
            new = values.detach().cpu().to(state[like].dtype)
            if not bool(torch.isfinite(new).all()):
                raise UserError(f"not mended: {theirs} would not be finite")
            old = state.get(theirs)
            also = [n for n in state if old is not None and _same_memory(state[n], old)]
            tied = found.tied.get(f"{layer}.{buffer}" if layer else buffer, ())
            changes |= dict.fromkeys([theirs, *also, *(found.names[n] for n in tied)], new)
    content = _replaced(checkpoint.content, state, changes, {})
    if checkpoint.is_safetensors:
        from safetensors.torch import save

        tensors = {name: t.contiguous() for name, t in content.items()}
        tensors |= {name: t.clone() for name, t in changes.items()}  # it refuses shared memory
        write_atomically(out, save(tensors, metadata=checkpoint.metadata))
        return
    serialized = io.BytesIO()
    torch.save(content, serialized)
    write_atomically(out, serialized.getbuffer())


def mappings(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict]]:
    """The mappings of names to tensors within `content`, with where they lie (dotted).

    Those of an optimizer are passed over.
    """
    if not isinstance(content, Mapping):
        return
    tensors = [v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)]
    if 2 * len(tensors) > len(content):
        yield key, {k: v for k, v in content.items() if isinstance(v, Tensor)}
    for name, value in content.items():
        if depth < DEPTH and isinstance(name, str) and "optim" not in name.lower():
            yield from mappings(value, f"{key}.{name}" if key else name, depth + 1)


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise UserError(f"weights {path} need safetensors: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return Checkpoint(path, {k: file.get_tensor(k) for k in file.keys()}, file.metadata())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights {path} can't be read: {error}") from None


def _numpy_scalars() -> list[Any]:
    import numpy as np

    rebuild = np.float64(0).__reduce__()[0]
    return [rebuild, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers, as `state_dict` names them; BN buffers that
    are no tensors (track_running_stats=False) are not among them."""
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in the model -> name in the file, for the prefix that most names agree on."""
    file, here = _unwrapped(state), _unwrapped(wanted)
    best: dict[str, str] = {}
    for cut, added in _prefixes(file, here):
        names = {
            here[plain]: file[added + plain.removeprefix(cut)]
            for plain in here
            if plain.startswith(cut) and added + plain.removeprefix(cut) in file
        }
        if len(names) > len(best):
            best = names
    return {name: best[name] for name in wanted if name in best}


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without the wrappers' parts -> names as they are."""
    plain = {}
    for name in names:
        plain[".".join(part for part in name.split(".") if part not in WRAPPERS)] = name
    return plain


def _prefixes(file: Mapping[str, str], here: Mapping[str, str]) -> list[tuple[str, str]]:
    """What may have to be cut from the model's names and what put before: ("", "") first."""
    pairs = {("", ""): None}
    for name in list(here)[:3]:
        for theirs in file:
            if theirs.endswith("." + name):
                pairs["", theirs.removesuffix(name)] = None
            if name.endswith("." + theirs):
                pairs[name.removesuffix(theirs), ""] = None
    return list(pairs)


def _preference(key: str) -> tuple[int, str]:
    return (PREFERRED.index(key) if key in PREFERRED else len(PREFERRED), key)


def _name_in_file(found: Match, layer: str, buffer: str) -> tuple[str, str]:
    """What a buffer is called in the file, and a tensor of the layer there to take the dtype of."""
    prefix = f"{layer}." if layer else ""
    if prefix + buffer in found.names:
        return found.names[prefix + buffer], found.names[prefix + buffer]
    beside = next((n for n in found.names if n in (prefix + "weight", prefix + "bias")), None)
    if beside is None:
        raise UserError(f"the checkpoint has no tensor of BN layer {layer!r} to write beside")
    theirs = found.names[beside]
    return theirs.removesuffix(beside.rpartition(".")[2]) + buffer, theirs


def _at(content: Any, key: str) -> Mapping[str, Any]:
    """The mapping that `mappings` gives this key, whole."""
    while key:
        parts = key.split(".")
        name = next(k for k in (".".join(parts[:n]) for n in range(len(parts), 0, -1))
                    if k in content)  # fmt: skip
        content, key = content[name], key[len(name) + 1 :]
    return content


def _replaced(content: Any, state: Mapping, changes: Mapping[str, Tensor], done: dict) -> Any:
    """`content` with changes in `state` and wherever else the very same tensors are; what holds
    neither is the same objects, and what was one object is one again."""
    import copy

    if not isinstance(content, Mapping):
        return content
    if id(content) not in done:
        done[id(content)] = content
        if _same_tensors(content, state):
            new = dict(changes)
        else:
            inside = {k: _replaced(v, state, changes, done) for k, v in content.items()}
            new = {k: v for k, v in inside.items() if v is not content[k]}
        if new:
            done[id(content)] = copy.copy(content)
            done[id(content)].update(new)
    return done[id(content)]


def _same_tensors(one: Mapping, other: Mapping) -> bool:
    return one is other or (
        one.keys() == other.keys() and all(_same_memory(one[k], v) for k, v in other.items())
    )


def _same_memory(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return one is other
    where = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (one, other)]
    return one is other or (where[0] == where[1] and one.numel() > 0)


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def same_averages_as(checkpoint: Checkpoint, found: Match, model: nn.Module) -> str | None:
    """Where in the file other weights have bit for bit the BN averages that were found, if so."""
    state = dict(mappings(checkpoint.content))
    buffers = {
        f"{layer}.{b}" if layer else b for layer in batchnorm_layers(model) for b in BUFFERS[:2]
    }
    for key in state:
        if key == found.key:
            continue
        other = _fit(state[key], _tensors(model))
        shared = [n for n in found.names if n in other and n not in buffers]
        both = [n for n in found.names if n in other and n in buffers]
        if not both or not shared:
            continue
        same = {
            n: torch.equal(state[key][other[n]], state[found.key][found.names[n]])
            for n in (*shared, *both)
        }
        if all(same[n] for n in both) and not all(
            same[n] for n in shared if not n.endswith(BUFFERS[2])
        ):
            return key
    return None
