"""Which pathways' copies of kept weights lie in memory, within a limit of bytes.

A pathway is resident as a whole or not at all. A forward pass pins its pathway while it runs; when
another one is needed, those that were used longest ago give way, but none that is pinned. A
pathway for which no room can be made is computed without copies, so the limit is never exceeded
and nobody waits.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any


class Residents:
    """The resident pathways of one model, those used last at the end.

    Attributes:
        limit: Most bytes of copies; None for no limit.
    """

    def __init__(self, measure: Callable[[Any], int], evict: Callable[[Any], None]) -> None:
        """Begin with none.

        Args:
            measure: Returns the bytes that a pathway's copies take.
            evict: Drops a pathway's copies.
        """
        self.limit: int | None = None
        self._measure, self._evict = measure, evict
        self._bytes: OrderedDict[Hashable, int] = OrderedDict()
        self._pins: Counter[Hashable] = Counter()
        self._lock = threading.RLock()

    def pin(self, pathway: Hashable) -> bool:
        """Make room for a pathway and keep it there until ``unpin``; say whether there was any."""
        with self._lock:
            if pathway not in self._bytes:
                size = self._measure(pathway)
                if not self._make_room(size):
                    return False
                self._bytes[pathway] = size
            self._bytes.move_to_end(pathway)
            self._pins[pathway] += 1
            return True

    def unpin(self, pathway: Hashable, *, forget: bool = False) -> None:
        """Take one ``pin`` back; evict what nobody will ask for again with the last one."""
        with self._lock:
            self._pins[pathway] -= 1
            if forget and not self._pins[pathway]:
                del self._pins[pathway]
                self._remove(pathway)

    def clear(self) -> None:
        """Evict every pathway that is not pinned; each is measured anew when it is next used."""
        with self._lock:
            for pathway in [p for p in self._bytes if not self._pins[p]]:
                self._remove(pathway)

    @property
    def sizes(self) -> Mapping[Any, int]:
        """Bytes by pathway, those used longest ago first."""
        with self._lock:
            return dict(self._bytes)

    def _make_room(self, size: int) -> bool:
        """Evict until some bytes more are within the limit; nothing if that cannot be."""
        if self.limit is None:
            return True
        pinned = sum(n for p, n in self._bytes.items() if self._pins[p])
        if pinned + size > self.limit:
            return False
        for pathway in [p for p in self._bytes if not self._pins[p]]:
            if sum(self._bytes.values()) + size <= self.limit:
                break
            self._remove(pathway)
        return True

    def _remove(self, pathway: Hashable) -> None:
        del self._bytes[pathway]
        self._evict(pathway)

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what holds for this process and these copies only."""
        return {"limit": self.limit, "_measure": self._measure, "_evict": self._evict}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with none again."""
        self.__init__(state["_measure"], state["_evict"])  # type: ignore[misc]
        self.limit = state["limit"]
