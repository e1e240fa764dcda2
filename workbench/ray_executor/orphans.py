"""Processes of Ray end with the raylet that started them.

A raylet that loses the head of its cluster ends itself, and one that is killed tells nobody. Ray's worker does not
notice while its main thread waits for a trial: the trial would train on, unseen, on a GPU that Ray offers to others.
"""

import os
import threading
import time

LOOK_SECONDS = 2.0


def end_with_raylet() -> None:
    """End this process, and so what it has started, when its parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="raylet", daemon=True).start()
