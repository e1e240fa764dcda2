"""predictions.parquet: the columns of `core.evaluation.score.Evaluation`, one row a (query, class) pair."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FORMAT = 1
_KEY = b"workbench.format"


def write(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write the columns, durably."""
    import numpy as np  # only a trial writes predictions
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(values: np.ndarray) -> pa.Array:  # as pa.array does, which imports pandas first
        buffer = pa.py_buffer(np.ascontiguousarray(values))
        return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])

    table = pa.table({name: column(values) for name, values in columns.items()})
    table = table.replace_schema_metadata({_KEY: str(FORMAT).encode()})
    pq.write_table(table, path, compression="zstd")
    with path.open("rb") as file:
        os.fsync(file.fileno())
