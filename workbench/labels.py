"""How scores are written on screens and in reports: their names and their unit. A leaf."""

POINTS = 100  # to an AP point; files hold fractions

METRICS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}
