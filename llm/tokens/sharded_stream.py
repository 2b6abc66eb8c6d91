"""Several token files as one stream of ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class Shards:
    """Memory-mapped files as one stream of N ids. A slice within one file is a view, any other a copy."""

    def __init__(self, files: Sequence[npt.NDArray[Any]]) -> None:
        self.files = [np.asarray(file) for file in files]  # plain arrays are indexed faster than memory maps
        self.dtype = files[0].dtype
        self.starts = np.cumsum([0, *map(len, files)], dtype=np.int64)  # first index of each file, and the end

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: Any, /) -> Any:
        if not isinstance(key, slice):
            return self._take(np.asarray(key))
        start, stop, step = key.indices(len(self))
        if step == 1:
            return self._slice(start, stop)
        return self._take(np.arange(start, stop, step))

    def _take(self, indices: npt.NDArray[Any]) -> Any:
        """Return the ids at `indices`, an array of any shape."""
        if indices.dtype.kind not in "iu":
            raise IndexError(f"indices of tokens are integers, not {indices.dtype}")
        flat = indices.astype(np.int64).ravel()
        flat[flat < 0] += len(self)
        if flat.size and (flat.min() < 0 or flat.max() >= len(self)):
            raise IndexError(f"index out of range for {len(self)} tokens")
        order = np.argsort(flat, kind="stable")
        ordered = flat[order]
        edges = np.searchsorted(ordered, self.starts)  # where the indices of each file begin in `ordered`
        ids = np.empty(flat.shape, self.dtype)
        for number in np.flatnonzero(np.diff(edges)).tolist():
            part = slice(edges[number], edges[number + 1])
            ids[order[part]] = self.files[number][ordered[part] - self.starts[number]]
        return ids.reshape(indices.shape)[()]

    def _slice(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return the ids of start..stop; a negative length is an empty slice."""
        borders = self.starts[1:-1]
        first, last = np.searchsorted(borders, [start, max(start, stop - 1)], "right").tolist()
        parts = []
        for number in range(first, last + 1):
            begin = int(self.starts[number])
            parts.append(self.files[number][max(0, start - begin) : max(0, stop - begin)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
