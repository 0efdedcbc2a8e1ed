"""Checkpoints of other optimizers."""

from __future__ import annotations

import warnings
from typing import Any

# What the popular SAM class keeps in its state: the weights before the last perturbation, or the perturbation itself. The state
# of its base optimizer is an attribute's, which its state_dict() does not visit.
_POPULAR_KEYS = frozenset(("old_p", "e_w"))


def without_foreign_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` without what the popular SAM class has in the place of the base optimizer's state; warns if there is any.

    In the base optimizer's state it would be taken for that: Adam asks whether a parameter's state is empty.
    """
    state = state_dict.get("state", {})
    found = [entry for entry in state.values() if isinstance(entry, dict) and not _POPULAR_KEYS.isdisjoint(entry)]
    if not found:
        return state_dict
    kept = {
        key: {name: value for name, value in entry.items() if name not in _POPULAR_KEYS} if isinstance(entry, dict) else entry
        for key, entry in state.items()
    }
    warnings.warn(
        f"load_state_dict(): expected the base optimizer's state, got a checkpoint of the popular SAM class, which saves its "
        f"backups for {len(found)} parameters instead: the groups are loaded and the base optimizer starts afresh.",
        stacklevel=3,
    )
    return {**state_dict, "state": {key: entry for key, entry in kept.items() if entry}}
