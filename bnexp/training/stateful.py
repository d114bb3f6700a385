"""What owns numbers that must survive a resume."""

from __future__ import annotations

from typing import Any, ClassVar

from bnexp.errors import UserError


class Stateful:
    """Base of small objects whose `saved` attributes, plain numbers, go into a checkpoint."""

    saved: ClassVar[dict[str, type | tuple[type, ...]]]
    """Attribute -> the types it may have."""

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned. UserError, with nothing changed, if it is not that."""
        what = type(self).__name__
        if not isinstance(state, dict) or (missing := self.saved.keys() - state.keys()):
            lacks = f": {', '.join(sorted(missing))} is missing" if isinstance(state, dict) else ""
            raise UserError(f"the checkpoint has no state of {what}{lacks}")
        for name, types in self.saved.items():
            if not isinstance(state[name], types) or isinstance(state[name], bool):
                raise UserError(f"the checkpoint's {name} of {what} is {state[name]!r:.40}")
        for name in self.saved:
            setattr(self, name, state[name])
