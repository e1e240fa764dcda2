"""Looking at paths that somebody else has written down: what cannot be looked at is not there."""

from pathlib import Path


def is_file(path: Path) -> bool:
    """Tell whether there is a file that can be seen; False for names that no file can have, such as too long ones."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_dir(path: Path) -> bool:
    """Tell whether there is a folder that can be seen; False for names that no folder can have."""
    try:
        return path.is_dir()
    except OSError:
        return False
