"""Compiles a C++ file for this very CPU on first use, and keeps the library.

The library has a plain C interface and no knowledge of torch, so it compiles in seconds and serves
any torch. Its OpenMP runtime is the one torch already loaded: two in one process would each
keep a team of threads and fight over the cores.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NATIVE = ("-march=native",)
NO_AMX = ("-mno-amx-tile",)
# No contraction: whether a*b + c rounds once or twice must not depend on the template instance. No
# unique symbols: libraries for different CPUs in one process must not share what a thread keeps.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno",
         "-fno-gnu-unique", "-w")  # fmt: skip

logger = logging.getLogger(__name__)


class BuildError(OSError):
    """The library cannot be built here; the message says why."""


def load_library(
    source: Path, cache: Path | None = None, target: tuple[str, ...] = NATIVE
) -> ctypes.CDLL:
    """`source` as a shared library, compiled now if `cache` has none of its kind.

    `cache` defaults to ~/.cache/slipstream; headers are the `.h` files beside the source. Safe
    against other processes building the same. Raises `BuildError`.
    """
    try:
        folder = cache or Path.home() / ".cache" / "slipstream"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        library = folder / f"{source.stem}-{_key(source, target)}.so"
        if not library.exists():
            with open(library.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not library.exists():
                    _build(source, library, target)
        return ctypes.CDLL(str(library))
    except RuntimeError as error:  # no home folder
        raise BuildError(str(error)) from error


def openmp_runtime() -> Path:
    """The OpenMP library that torch uses. Raises `BuildError` if it is not clear which that is.

    Others may be loaded beside it: scikit-learn, for one, brings its own.
    """
    maps = Path("/proc/self/maps").read_text()
    found = set(map(Path, re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps)))
    torch = set(map(Path, re.findall(r"/\S*/libtorch_cpu\.so", maps)))
    beside = {path for path in found for library in torch if path.parent == library.parent}
    chosen = beside if len(found) > 1 else found
    if len(chosen) != 1:
        names = ", ".join(sorted(map(str, found))) or "none"
        raise BuildError(f"cannot tell which OpenMP runtime in the process is torch's: {names}")
    return chosen.pop()


def _compiler() -> str:
    path = shutil.which("g++")
    if path is None:
        raise BuildError("no g++ on the PATH")
    return path


def _key(source: Path, target: tuple[str, ...]) -> str:
    """A hash of whatever the library depends on."""
    digest = hashlib.sha256()
    for path in _files(source):
        digest.update(path.read_bytes())
    version = _run(_compiler(), "-dumpfullversion", "-dumpmachine")
    digest.update(repr((version, FLAGS, target, _cpu(), openmp_runtime().name)).encode())
    return digest.hexdigest()[:16]


def _files(source: Path) -> list[Path]:
    return [source, *sorted(source.parent.glob("*.h"))]


def _cpu() -> str:
    """What -march=native looks at: a home folder may be shared by machines of many kinds."""
    info = Path("/proc/cpuinfo").read_text()
    wanted = re.findall(r"^(?:model name|flags|Features|CPU part)\s*:.*$", info, re.MULTILINE)
    return platform.machine() + "\n".join(sorted(set(wanted)))


def _build(source: Path, library: Path, target: tuple[str, ...]) -> None:
    """Compile, and keep what proves itself; without AMX where that fails."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unit, linked = Path(folder, "unit.o"), Path(folder, "unit.so")
        for restriction in ((), NO_AMX):
            flags = (*FLAGS, *target, *restriction)
            _run(_compiler(), *flags, "-c", str(source), "-o", str(unit))
            _run(_compiler(), "-shared", str(unit), str(openmp_runtime()), "-o", str(linked))
            reason = _self_check(linked)
            if reason is None:
                os.replace(linked, library)
                return
            logger.warning("%s does not compute as it should: %s", source.name, reason)
        raise BuildError(f"{source.name} does not compute as it should here: {reason}")


def _self_check(library: Path) -> str | None:
    """Why the library's own check failed in a process of its own (it may crash), or None."""
    check = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); "
        "sys.exit(getattr(library, 'slipstream_self_check', int)())"
    )
    done = subprocess.run((sys.executable, "-c", check, str(library)), check=False)
    return None if done.returncode == 0 else f"exit status {done.returncode}"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout
