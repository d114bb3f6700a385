"""Which processes work together: this one alone, so far."""

from __future__ import annotations

import os
from dataclasses import dataclass

from bnexp.errors import UserError


@dataclass(frozen=True)
class Alone:
    """This process alone, whatever process group it is in."""


Ranks = Alone


def choose_ranks(ranks: Ranks | None, what: str) -> Ranks:
    """`ranks`, or this process alone where nothing was chosen and there is nothing to choose.

    Raises UserError under an initialized process group of several ranks if `ranks` is None: every
    rank would silently end with its own numbers.
    """
    if ranks is None and (size := _group_size()) > 1:
        raise UserError(
            f"{what} in one of {size} ranks of a process group sees this rank's samples alone, so "
            "every rank ends with other numbers: do it on one rank for all samples, or pass "
            "ranks=bnexp.ranks.Alone() if that is meant"
        )
    return Alone() if ranks is None else ranks


def refuse_launcher(what: str) -> None:
    """Raise UserError where torchrun (or another launcher) started several processes of this."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and size.isdecimal() and int(size) > 1:
        raise UserError(
            f"{what} was started {size} times by a launcher such as torchrun, and would be {size} "
            f"unrelated runs: start it once, as `{what}`"
        )


def _group_size() -> int:
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1
