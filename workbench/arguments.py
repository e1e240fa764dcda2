"""Options of the command line that several commands share, or that are many."""

import argparse
from pathlib import Path
from typing import Any

from workbench.object_store import folder_or_uri

_DATA_HELP = "a folder of pictures in COCO format, or its address in an object store (s3://...), which is copied first"


def evaluate_options(commands: Any) -> argparse.ArgumentParser:
    """Add the command `evaluate` and return its parser."""
    text = "score a checkpoint on a folder in COCO format: ours, official DETR or Deformable DETR"
    parser = commands.add_parser("evaluate", help=text, description=text, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", required=True)
    parser.add_argument("--recipe", metavar="NAME", help="of an official file whose tensors fit several")
    parser.add_argument("--data", type=folder_or_uri, metavar="DIR", help=_DATA_HELP)
    parser.add_argument("--split", choices=("val", "tune"), default="val", help="the scored pictures; default: val")
    parser.add_argument("--num-pictures", type=int, metavar="N", help="only the first N")
    parser.add_argument("--parameters", choices=("raw", "averaged"), help="which weights; default: as configured")
    parser.add_argument("--predictions", type=Path, metavar="OUT.json", help="write the detections, a COCO result list")
    parser.add_argument(
        "--losses", action="store_true", help="also the mean of every loss term, and the gradient's norm"
    )
    parser.add_argument("--device", default="cpu", help="a torch device; default: cpu")
    parser.add_argument("--allow-code", action="store_true", help="run the code of parts of your own")
    json_option(parser)
    return parser


def doctor_options(commands: Any, runs: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command `doctor` and return its parser."""
    text = "check this machine; with --profile: does the code score what was published, and learn as it should?"
    parser = commands.add_parser("doctor", help=text, description=text, parents=[runs], allow_abbrev=False)
    parser.add_argument("--profile", metavar="P", help="check detector and data at this scale: docs/budget.md")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="an official file of DETR or Deformable DETR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="COCO 2017")
    parser.add_argument("--recipe", metavar="NAME", help="of a file whose tensors fit several")
    parser.add_argument("--study", type=Path, metavar="STUDY", help="train its baseline, not the bare recipe")
    parser.add_argument("--device", default="cpu", help="a torch device; default: cpu")
    parser.add_argument(
        "--record-band",
        choices=("steps", "epoch"),
        nargs="?",
        const="epoch",
        help="keep where the losses of several seeds lie, over 200 steps or the first epoch too (default)",
    )
    json_option(parser)
    return parser


def selection_options() -> argparse.ArgumentParser:
    """Return the options that say what of a study is meant, in every command about studies."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("selection")
    group.add_argument("--profile", metavar="P", help="the scale; default: laptop, or pictures with --data")
    group.add_argument("--data", type=folder_or_uri, metavar="DIR", help=_DATA_HELP)
    group.add_argument(
        "--variants", type=_names, metavar="A,B|all", help="which variants; the baseline is always among them"
    )
    group.add_argument("--seeds", type=int, metavar="N", help="one look of N seeds with alpha .05")
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; repeatable")
    group.add_argument("--budget", metavar="10m", help="start no further look after this time")
    group.add_argument("--tracking-uri", metavar="URI", help="of another MLflow than the one in the runs folder")
    return parser


def _names(text: str) -> tuple[str, ...]:
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: names with commas between them, or all")
    return found


def number(text: str) -> float:
    """Read a positive number.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a number above 0")
    return found


def runs_option() -> argparse.ArgumentParser:
    """Return the option that says where the records are."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="the records; default: runs")
    return parser


def json_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for output that programs read."""
    parser.add_argument("--json", action="store_true", help="one JSON document")
