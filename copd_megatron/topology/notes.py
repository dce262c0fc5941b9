"""Small values that branches leave for each other without waiting: one a branch and step, in the job's store.

A gather makes every branch as late as the latest. Where nothing in a step depends on another branch, its
first rank leaves a note instead, and whoever needs the note reads it later, when it is usually there.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

from copd_megatron.topology.messages import decode, encode
from copd_megatron.topology.world import World


class Notes:
    """The notes on one topic. Used by the first rank of each branch."""

    def __init__(self, world: World, topic: str) -> None:
        self._world, self._topic = world, topic

    def leave(self, step: int, value: Any) -> None:
        """Leaves this branch's note."""
        # torch takes bytes as well, which its type stubs do not know
        self._world.store.set(self._key(step, self._world.branch), cast(str, encode(value)))

    def take_away(self, step: int, *, own: bool = False) -> None:
        """Removes the notes of a step that nobody will read any more: all of them, or this branch's own."""
        for key in [self._key(step, self._world.branch)] if own else self._keys(step):
            self._world.store.delete_key(key)

    def are_there(self, step: int) -> bool:
        """Whether every branch has left its note of a step."""
        found: bool = self._world.store.check(self._keys(step))
        return found

    def read(self, step: int) -> list[Any]:
        """The notes of a step, by branch in the configuration's order; waits for them."""
        store, watch = self._world.store, self._world.watch
        with watch.operation(f"{self._topic}.wait"):
            store.wait(self._keys(step), timedelta(seconds=watch.timeout_seconds))
        # all at once: a branch far away pays for the way to the store and back with each question
        return [decode(note) for note in store.multi_get(self._keys(step))]

    def _keys(self, step: int) -> list[str]:
        return [self._key(step, branch) for branch in self._world.branches]

    def _key(self, step: int, branch: str) -> str:
        return f"notes/{self._topic}/{step}/{branch}"
