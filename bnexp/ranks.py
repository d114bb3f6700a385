"""Several processes that work together, or one alone."""

from __future__ import annotations

import torch.distributed


def require_alone(what: str) -> None:
    """Refuse `what` in a process group of more than one rank: each would end with other numbers."""
    from bnexp.errors import UserError

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise UserError(
                f"{what} is for one process, and this is one of {ranks} ranks, which would all "
                "end with other numbers: do it on one rank, outside the process group"
            )
