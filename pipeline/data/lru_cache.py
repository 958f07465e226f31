"""A small cache of the most recently used values."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class LRUCache:
    """Keeps the `limit` most recently used values. A pickled copy is empty: the values can be made again."""

    def __init__(self, limit: int):
        self.limit = limit
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `key`, from `make()` where it is not there."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        if len(self._values) > self.limit:
            self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        """Keeps nothing."""
        self._values.clear()

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self):
        return LRUCache, (self.limit,)
