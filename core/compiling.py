"""`torch.compile` of the backbone: the one part whose shapes seldom change and whose operations fuse well."""

import torch
from torch import nn

from core.model.backbone import Backbone


def compile_backbones(detector: nn.Module) -> None:
    """Compile the detector's backbones in place, which keeps the names of their weights.

    Raises:
        RuntimeError: if torch cannot compile here, as without a C++ compiler.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(1))
    except Exception as error:
        raise RuntimeError(
            f"training.compile: torch.compile does not work here ({type(error).__name__}: {_first_line(error)}): "
            "install a C++ compiler (g++), or set training.compile to false"
        ) from error
    for module in detector.modules():
        if isinstance(module, Backbone):
            module.compile()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
