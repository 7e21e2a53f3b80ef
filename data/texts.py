"""Many texts in one buffer: loader workers that are forked share it, while of a list they would copy every page.

Reading an element of a list writes its reference count, and the kernel then copies the page that the count lies on.
"""

import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload


class Texts(Sequence[str]):
    """A list of texts that only grows at its end; equal to any sequence of the same texts, a slice of it is a list."""

    __hash__ = None  # type: ignore[assignment]  # it can grow

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.data, self.bounds = bytearray(), array("q", [0])  # UTF-8; text i is data[bounds[i] : bounds[i + 1]]
        for text in texts:
            self.append(text)

    @classmethod
    def of(cls, data: bytes, bounds: bytes) -> "Texts":
        """The texts whose bytes, and whose bounds as bytes, another one had."""
        found = cls()
        found.data, found.bounds = bytearray(data), array("q", bounds)
        return found

    def append(self, text: str) -> None:
        self.data += text.encode("utf-8", "surrogatepass")  # JSON can hold half of a surrogate pair
        self.bounds.append(len(self.data))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} texts, not one with the index {index}")
        index %= len(self)
        return self.data[self.bounds[index] : self.bounds[index + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return self.bounds == other.bounds and self.data == other.data
        if isinstance(other, list):
            return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        return NotImplemented
