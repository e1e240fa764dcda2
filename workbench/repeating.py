"""Look at something now and then while the driver does something else."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(
    look: Callable[[], None], *, every: float, name: str, on_error: Callable[[Exception], None]
) -> Iterator[None]:
    """Call `look` every so many seconds within the block, in a thread of its own.

    What it raises goes to `on_error`, and it is called again: a watch that ends in silence watches nothing.
    """
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(every):
            try:
                look()
            except Exception as error:  # noqa: BLE001 - whatever a look raises, others have to follow
                on_error(error)

    thread = threading.Thread(target=loop, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
