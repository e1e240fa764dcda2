"""Every parameter starts from a random stream of its own, keyed by the seed and the module's name.

So a toggle that adds or removes a part leaves the starting weights of all shared parts as they were. The parts say
*how* they start in `reset_parameters`; random numbers are drawn in leaf modules only, parents merely set constants.
"""

from collections.abc import Callable

from torch import nn

from core.seeding import seeded

Reset = Callable[[nn.Module], None]


def initialise(module: nn.Module, *, seed: int, name: str = "", reset: Reset | None = None) -> None:
    """Reset all parameters of `module`, children before parents.

    A part whose leaves start differently (a backbone) brings a method `reset_leaf(module)`, used for all that is
    below it.
    """
    reset = getattr(module, "reset_leaf", reset)
    for child_name, child in module.named_children():
        initialise(child, seed=seed, name=f"{name}.{child_name}", reset=reset)
    with seeded(seed, "init", name):
        if reset is not None:
            reset(module)
        else:
            reset_parameters(module)


def reset_parameters(module: nn.Module) -> None:
    """Let a module set its own parameters, if it has any."""
    own = getattr(module, "reset_parameters", None)
    if callable(own):
        own()
