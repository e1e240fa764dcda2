"""Where the compiled form of deformable attention is built, how it is chosen, and what happens where it cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import SHAPES, around_in_torch, around_references, at_locations, needs_compiler, with_gradients

from core.model import kernel, sampling
from core.model.sampling import sample_and_sum, sample_and_sum_in_torch, sample_around

ROOT = Path(__file__).parents[2]


def test_a_wrong_choice_is_an_error(anew, monkeypatch):
    """WORKBENCH_KERNEL has three values, and the error names them."""
    monkeypatch.setenv("WORKBENCH_KERNEL", "fast")
    with pytest.raises(ValueError, match="WORKBENCH_KERNEL: found 'fast', allowed are auto, torch, cpp"):
        sample_and_sum(at_locations()[0], SHAPES, *at_locations()[1:])


def test_the_pytorch_form_can_be_chosen(anew, monkeypatch, capfd):
    """WORKBENCH_KERNEL=torch computes exactly the PyTorch form and says nothing."""
    monkeypatch.setenv("WORKBENCH_KERNEL", "torch")
    monkeypatch.setattr(sampling, "used", set())
    inputs = around_references(4)
    found, expected = with_gradients(sample_around, *inputs), with_gradients(around_in_torch, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert sampling.used == {"torch"}
    assert capfd.readouterr() == ("", "")


def _compiler_that_fails(folder):
    script = folder / "broken-c++"
    script.write_text("#!/bin/sh\necho 'no room on the moon' >&2\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    return str(script)


PROBLEMS = {
    "none": ({"PATH": "", "CXX": ""}, "no C++ compiler: install one"),
    "misnamed": ({"CXX": "c+++"}, "CXX names 'c+++', which is not there"),
    "broken": ({"CXX": "{broken}"}, "fails: repair it, or name another in CXX"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_without_a_working_compiler_the_pytorch_form_runs_and_one_line_says_so(
    anew, monkeypatch, tmp_path, capfd, problem
):
    """Nothing fails; the line says what to do, and is printed once a process."""
    environment, message = PROBLEMS[problem]
    monkeypatch.setenv("WORKBENCH_KERNEL", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(broken=_compiler_that_fails(tmp_path)))
    inputs = at_locations()
    for _ in range(2):
        torch.testing.assert_close(
            sample_and_sum(inputs[0], SHAPES, *inputs[1:]), sample_and_sum_in_torch(inputs[0], SHAPES, *inputs[1:])
        )
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert message in said


def test_insisting_shows_what_the_compiler_says(anew, monkeypatch, tmp_path):
    """WORKBENCH_KERNEL=cpp is an error where the compiled form cannot be built."""
    monkeypatch.setenv("WORKBENCH_KERNEL", "cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", _compiler_that_fails(tmp_path))
    with pytest.raises(kernel.KernelProblem, match=r"(?s)WORKBENCH_KERNEL=cpp: .*no room on the moon"):
        sample_and_sum(at_locations()[0], SHAPES, *at_locations()[1:])


def _quick_compiler(folder, *, change="s/^//"):
    """Return a compiler that does not optimise, of sources that `change` (a program of sed) has been applied to."""
    script = folder / "quick-c++"
    script.write_text(
        "#!/bin/sh\n"
        f"copy=$(mktemp -d '{folder}/copy-XXXXXX')\n"
        f"cp '{kernel.SOURCES[0]}' \"$copy\"\n"
        f"sed '{change}' '{kernel.SOURCES[1]}' > \"$copy/{kernel.SOURCES[1].name}\"\n"
        'for word do shift; case "$word" in *.cpp) word="$copy/${word##*/}";; esac; set -- "$@" "$word"; done\n'
        f'exec {" ".join(kernel._compiler())} "$@" -O0\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return str(script)


@needs_compiler
def test_a_kernel_that_computes_wrongly_is_not_used(anew, monkeypatch, tmp_path, capfd):
    """A compiler whose program gives other numbers is found out before anything is trained with it."""
    monkeypatch.setenv("CXX", _quick_compiler(tmp_path, change="s/- T(0.5)/- T(0.4)/"))
    monkeypatch.setenv("WORKBENCH_KERNEL", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sampling._kernel() is None
    assert "computes other numbers" in capfd.readouterr().err


_CHOOSE = "from core.model.kernel import choose; print(choose(lambda kernel: None) is not None)"


@needs_compiler
def test_processes_may_build_it_at_once(tmp_path):
    """Trials that start together all get it, and leave one whole library in the cache, which the next one loads."""
    folder = tmp_path / "cache"
    changes = {"XDG_CACHE_HOME": str(folder), "WORKBENCH_KERNEL": "cpp", "CXX": _quick_compiler(tmp_path)}

    def start():
        command, environment = [sys.executable, "-c", _CHOOSE], os.environ | changes
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    assert [process.communicate(timeout=100) for process in [start(), start()]] == [("True\n", "")] * 2
    (left,) = (folder / "detr-ablation-workbench" / "kernels").iterdir()
    written = left.stat().st_mtime_ns
    assert start().communicate(timeout=100) == ("True\n", "")
    assert left.stat().st_mtime_ns == written
    left.write_bytes(b"\x7fELF")
    assert start().communicate(timeout=100) == ("True\n", ""), "a library that is not whole is built anew"
    assert left.stat().st_size > 1000


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, capfd):
    """The kernel is then built for this process alone, and one line says so."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("CXX", _quick_compiler(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("WORKBENCH_KERNEL", "auto")
    assert kernel.choose(lambda _: None) is not None
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "compiled anew for each process" in said
