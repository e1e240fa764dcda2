"""The checks of `doctor` on what is installed and how it is set: versions, compiler, GPUs, Ray's token, proxies."""

import os
import re
import stat
import sys
import tomllib
import urllib.request
from pathlib import Path

from core.model import kernel
from workbench import provenance
from workbench.findings import Finding, State, by_state, note, ok, problem
from workbench.provenance import installed

MOST_NAMED = 5
_ROOT = Path(__file__).resolve().parent.parent  # of the project, where its files of versions are


def proxies(_runs: Path) -> Finding:
    """See whether a proxy would catch what this machine says to itself."""
    names = sorted(name for name in ("http", "https", "all") if name in urllib.request.getproxies_environment())
    caught = [host for host in ("127.0.0.1", "localhost") if not urllib.request.proxy_bypass(host)]
    if names and caught:
        return problem(
            "proxy",
            f"{', '.join(f'{name}_proxy' for name in names)} is set and would catch {' and '.join(caught)}",
            "export no_proxy=localhost,127.0.0.1 NO_PROXY=localhost,127.0.0.1",
        )
    found = f"{', '.join(f'{name}_proxy' for name in names)} is set, not for this machine" if names else "none"
    return ok("proxy", found)


def versions(_runs: Path) -> Finding:
    """Compare what is installed with pyproject.toml, which it must fit, and constraints.txt, which was tested."""
    try:
        project = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        tested = _pins((_ROOT / "constraints.txt").read_text("utf-8"))
    except OSError:
        return note("versions", "pyproject.toml and constraints.txt are not there to compare")
    wrong = [text for line in project["dependencies"] if (text := unmet(line))]
    if below(".".join(map(str, sys.version_info[:3])), project["requires-python"].removeprefix(">=")):
        wrong.append(f"Python {sys.version.split()[0]}, needs {project['requires-python']}")
    if wrong:
        remedy = "python -m pip install --constraint constraints.txt --editable ."
        return problem("versions", "; ".join(wrong), remedy)
    others = [f"{name} {found}" for name, pin in tested.items() if (found := installed(name)) not in (None, pin)]
    more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
    named = f"{', '.join(others[:MOST_NAMED])}{more}: not those of constraints.txt, which are tested"
    return Finding(
        what="versions", state="note" if others else "ok", found=named if others else "as in constraints.txt"
    )


def unmet(requirement: str) -> str:
    """Say how a line of pyproject.toml is not met; "" where it is. Of its bounds, `>=` and `==` are looked at."""
    name, _, bounds = re.fullmatch(r"([\w.-]+)(\[[^]]*\])?(.*)", requirement.replace(" ", ""), re.DOTALL).groups()  # type: ignore[union-attr]
    found = installed(name)
    if found is None:
        return f"{name} is not installed"
    for bound in filter(None, bounds.split(",")):
        least, exact = bound.removeprefix(">="), bound.removeprefix("==")
        if (bound.startswith(">=") and below(found, least)) or (bound.startswith("==") and found != exact):
            return f"{name} {found}, needs {bound}"
    return ""


def below(found: str, least: str) -> bool:
    """Tell whether a version is lower than another, by the numbers that both have."""
    numbers = [[int(part) for part in re.findall(r"\d+", text.split("+")[0])] for text in (found, least)]
    return numbers[0] < numbers[1]


def _pins(text: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


def kernel_of_attention(_runs: Path) -> Finding:
    """Build the compiled form of deformable attention, or take the one that was kept."""
    said: list[str] = []
    try:
        built = kernel.choose(lambda _: None, tell=said.append)
    except (ValueError, kernel.KernelProblem) as error:
        return problem("kernel", str(error).splitlines()[0])
    if said:
        return note("kernel", said[0])
    found = "compiled" if built else f"the PyTorch form, as {kernel.VARIABLE} says"
    return ok("kernel", found)


def gpus(_runs: Path) -> Finding:
    """Compare the GPUs that the driver lists with those that torch can use."""
    listed = provenance.visible_gpus()
    if not listed:
        return ok("GPU", "none visible; trials run on the CPU")
    import torch  # takes seconds, and says nothing where there is no GPU

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if usable < len(listed):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return problem(
            "GPU",
            f"the driver lists {len(listed)} ({', '.join(dict.fromkeys(listed))}), torch can use {usable}",
            f"torch {torch.__version__} is {built}: install one that fits the driver, or hide the GPUs from it",
        )
    if len(set(listed)) > 1:
        found = f"of several types: {', '.join(dict.fromkeys(listed))}; a pair of trials that differs in it is marked"
        return note("GPU", found, "choose one type with CUDA_VISIBLE_DEVICES")
    return ok("GPU", f"{len(listed)} x {listed[0]}")


def ray_token(_runs: Path) -> Finding:
    """Tell where Ray's token comes from and who can read it; the token itself is told nobody."""
    mode, cluster = os.environ.get("RAY_AUTH_MODE"), "RAY_ADDRESS" in os.environ
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    bad: State = "problem" if cluster else "ok"
    if mode == "disabled":
        found = f"RAY_AUTH_MODE=disabled{', and RAY_ADDRESS names a cluster' if cluster else ''}"
        return by_state("Ray token", bad, found, "unset it: whoever reaches the cluster's port could run code on it")
    if "RAY_AUTH_TOKEN" in os.environ:
        found = "in RAY_AUTH_TOKEN, which every process of this shell can read"
        return note("Ray token", found) if cluster else ok("Ray token", found)
    if path.is_file() and _read_by_others(path):
        found, remedy = f"{path} can be read by others", f"chmod 600 {path}"
        return problem("Ray token", found, remedy) if cluster else note("Ray token", found, remedy)
    if path.is_file():
        return ok("Ray token", f"in {path}")
    found = "none, and this machine alone needs none; on a cluster every node has the same one"
    return by_state("Ray token", bad, found, "make one with ray get-auth-token --generate: docs/security.md")


def _read_by_others(path: Path) -> bool:
    """Tell whether other users may read a file: its own permissions, and those of the folders on the way."""
    folders = path.resolve().parents
    return bool(path.stat().st_mode & stat.S_IROTH) and all(place.stat().st_mode & stat.S_IXOTH for place in folders)
