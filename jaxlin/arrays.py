"""One-dimensional .npy files whose length is known at their end only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def growing_array(path: Path, dtype: Any) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a .npy file piece by piece: what it yields appends an array [N], cast to `dtype`.

    The file is whole when the context ends without an exception. OSError where it cannot be written.
    """
    dtype = np.dtype(dtype)
    header = {"descr": dtype.str, "fortran_order": False}
    count = 0

    def append(values: np.ndarray) -> None:
        nonlocal count
        values.astype(dtype).tofile(file)
        count += len(values)

    with path.open("wb") as file:
        # NumPy pads the header so that it can be written again when the length is known.
        np.lib.format.write_array_header_1_0(file, header | {"shape": (0,)})
        yield append
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (count,)})
