"""The names under which MLflow knows the curves."""

from core.events import EpochFinished, StepsTaken


def numbers(event: StepsTaken | EpochFinished) -> dict[tuple[str, str], float]:
    """Return what an event measured, by (parameters, name)."""
    measured = {
        **{f"loss/{name}": value for name, value in event.losses.items()},
        "grad_norm": event.grad_norm,
        "learning_rate": event.learning_rate,
        "pictures_per_s": event.pictures_per_s,
        **({} if event.data_share is None else {"data_share": event.data_share}),
    }
    if isinstance(event, StepsTaken):
        return {("", name): value for name, value in measured.items()}
    epoch = {("", f"epoch/{name}"): value for name, value in measured.items()}
    scores = {
        (parameters, name): value
        for parameters, metrics in event.metrics.items()
        for name, value in metrics.numbers().items()
    }
    return {**epoch, ("", "peak_memory_bytes"): float(event.peak_memory_bytes), **scores}
