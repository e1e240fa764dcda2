"""predictions.parquet: the columns of `core.evaluation.score.Evaluation`, one row a (query, class) pair."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import StoreError

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


def read(path: Path) -> pa.Table:
    """Return the columns as an Arrow table; a file of before formats were kept counts as format 1.

    Raises:
        StoreError: there is none, it is damaged, or a later version of the workbench wrote it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path}: no predictions can be read there ({str(error).splitlines()[0]})") from error
    found = (table.schema.metadata or {}).get(_KEY, b"1").decode()
    if not found.isdigit() or int(found) > FORMAT:
        raise StoreError(f"{path}: format {found} was written by a later version; this one reads {FORMAT}: upgrade it")
    return table
