"""How scores and times are written on screens and in reports. A leaf."""

POINTS = 100  # to an AP point; files hold fractions

METRICS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}


def duration(seconds: float) -> str:
    """Return a time as people say it: 45 s, 12 min 30 s, 3 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(num_bytes: float) -> str:
    """Return bytes as people say them, in powers of ten as quotas are given: 512 B, 2.1 MB, 20 GB."""
    number, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
