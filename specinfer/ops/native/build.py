"""From C++ to a library for this very processor: compiled once, kept on disk, then only loaded.

Without a compiler, or on another kind of processor, there is none and PyTorch's kernels serve.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from specinfer.errors import ConfigError
from specinfer.paths import cache_folder

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
_FORMS = {
    "1": (("-march=native",), {"avx2", "fma"}),
    "avx2": (("-march=native", "-mno-avx512f"), {"avx2", "fma"}),
    "portable": ((), set[str]()),
}
"""By SPECINFER_NATIVE: what the compiler is told, which form the processor's flags choose from
then (`common.h`), and which flags it needs. By itself no processor is given the portable one, which
was not measured where it would serve."""
# A sum is a fused multiply-add where the source says so and nowhere else: a compiler that chose
# would choose differently for one row and for many. Rows of floats are read as words.
_FLAGS = (
    *("-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-fopenmp", "-shared", "-fPIC"),
)
_TIMEOUT_S = 300


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none, or SPECINFER_NATIVE is 0.

    raises  ConfigError where SPECINFER_NATIVE is none of 0, 1 and the forms, or a form that the
            processor has not
    cost    some 10 s when first asked for on a machine, then a millisecond
    """
    asked = os.environ.get("SPECINFER_NATIVE") or "1"
    if asked == "0":
        return None
    if asked not in _FORMS:
        raise ConfigError(
            f"SPECINFER_NATIVE={asked!r}: use 0 (PyTorch's kernels), 1 (ours), or to try one form "
            "of ours avx2 or portable"
        )
    (options, needed), flags = _FORMS[asked], _processor_flags()
    if platform.system() != "Linux" or not flags >= needed:
        if asked == "1":
            return None  # not measured elsewhere
        raise ConfigError(f"SPECINFER_NATIVE={asked}: not on this processor and system, use 1 or 0")
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or _installed()
        if compiler:
            return _load([*compiler, *options], flags)
        _log.warning(
            "no C++ compiler (g++, clang++, or CXX): PyTorch's kernels serve, which are slower"
        )
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        _log.warning(
            "PyTorch's kernels serve, which are slower, for ours could not be had: %s (CXX names a "
            "compiler, SPECINFER_CACHE a folder to keep them in)",
            error,
        )
    return None


def has_tiles() -> bool:
    """Whether the processor has AMX, with which oneDNN multiplies many rows faster than we do."""
    return "amx_bf16" in _processor_flags()


@cache
def _processor_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def _installed() -> list[str]:
    found = shutil.which("g++") or shutil.which("clang++")
    return [] if found is None else [found]


def _load(compiler: Sequence[str], flags: frozenset[str]) -> ctypes.CDLL:
    """The library as it is kept, or where it cannot be, one for this process alone."""
    name = _name(compiler, flags)
    try:
        return _load_kept(compiler, cache_folder() / "kernels", name)
    except OSError as error:
        _log.warning(
            "compiled kernels cannot be kept, so every start waits for them: %s (SPECINFER_CACHE "
            "names a folder to keep them in)",
            error,
        )
    with tempfile.TemporaryDirectory(prefix="specinfer-") as folder:
        return _load_new(compiler, Path(folder) / name)


def _name(compiler: Sequence[str], flags: frozenset[str]) -> str:
    key = hashlib.sha256(" ".join((*compiler[1:], *_FLAGS, *sorted(flags))).encode())
    key.update(_version(compiler))
    for source in sorted((*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h"))):
        key.update(source.read_bytes())
    return f"{key.hexdigest()[:32]}.so"


def _load_kept(compiler: Sequence[str], folder: Path, name: str) -> ctypes.CDLL:
    """The library from a folder, compiled into it where it is missing or cannot be loaded."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & stat.S_IWOTH:
        # What stands there would run as us.
        raise PermissionError(f"{folder} can be written by others: set SPECINFER_CACHE")
    target = folder / name
    if target.exists():
        try:
            return ctypes.CDLL(str(target))
        except OSError as error:  # cut short when a machine went down, or made for other libraries
            _log.warning("kernels are compiled anew: %s", error)
            target.unlink(missing_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one compiles
        return ctypes.CDLL(str(target)) if target.exists() else _load_new(compiler, target)


def _load_new(compiler: Sequence[str], target: Path) -> ctypes.CDLL:
    _compile(compiler, target)
    return ctypes.CDLL(str(target))


def _compile(compiler: Sequence[str], target: Path) -> None:
    _log.info("compiling kernels for this processor, once: some ten seconds")
    start_s = time.monotonic()
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        subprocess.run(
            [*compiler, *_FLAGS, "-w", str(_FOLDER / "decoder.cpp"), "-o", str(part)],
            check=True,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
        os.replace(part, target)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        said = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        raise RuntimeError(f"{shlex.join(compiler)} failed: {said}") from error
    finally:
        part.unlink(missing_ok=True)
    _log.info("kernels compiled in %.0f s", time.monotonic() - start_s)


def _version(compiler: Sequence[str]) -> bytes:
    return subprocess.run(
        [*compiler, "--version"], check=True, capture_output=True, timeout=30
    ).stdout
