"""`doctor`: what of this machine would stop a study, or make it less than it could be, before anything is started.

One finding for each thing looked at: `ok`, `note` (works, with a consequence that one should know) or `problem`, with
what to do. Nothing is contacted, changed or kept: files that it writes to see whether it can are taken away again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench import doctor_machine, doctor_software
from workbench.findings import Finding, check

CHECKS = (
    doctor_machine.cores,
    doctor_machine.memory,
    doctor_machine.shared_memory,
    doctor_machine.runs_folder,
    doctor_machine.disk,
    doctor_machine.file_system,
    doctor_machine.clock,
    doctor_machine.home,
    doctor_machine.temporary_folder,
    doctor_machine.ports,
    doctor_machine.network,
    doctor_software.proxies,
    doctor_software.versions,
    doctor_software.kernel_of_attention,
    doctor_software.gpus,
    doctor_software.ray_token,
)


def examine(runs: Path) -> tuple[Finding, ...]:
    """Look at everything; `runs` is the folder of the records, which need not be there."""
    return tuple(check(look, runs) for look in CHECKS)


def describe(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return what `--json` prints."""
    plain = [{name: getattr(item, name) for name in ("what", "state", "found", "remedy")} for item in findings]
    return {"problems": sum(item.state == "problem" for item in findings), "checks": plain}


def as_text(findings: Sequence[Finding]) -> str:
    """Return one line for each finding, and how many problems there are."""
    lines = [str(item) for item in findings]
    count = sum(item.state == "problem" for item in findings)
    lines.append("No problem found." if not count else f"{count} problem{'s' if count > 1 else ''} found.")
    return "\n".join(lines) + "\n"
