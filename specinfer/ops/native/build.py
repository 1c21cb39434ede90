"""From C++ to a library for this very processor: compiled once, kept on disk, then only loaded.

Without a compiler, or on another kind of processor, there is none and PyTorch's kernels serve.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

from specinfer.paths import cache_folder

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_FLAGS = ("-std=c++17", "-O2", "-march=native", "-fopenmp", "-shared", "-fPIC")
_TIMEOUT_S = 300


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none.

    cost  some 10 s when first asked for on a machine, then a millisecond
    """
    if os.environ.get("SPECINFER_NATIVE", "1") == "0":
        return None
    flags = _processor_flags()
    if platform.system() != "Linux" or not flags >= _NEEDED:
        return None  # not measured elsewhere
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        _log.warning(
            "no C++ compiler (g++, clang++, or CXX): PyTorch's kernels serve, which are slower"
        )
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, flags)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _log.warning("PyTorch's kernels serve, for ours could not be had: %s", error)
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


def _compiled(compiler: str, flags: frozenset[str]) -> Path:
    """Where the library is: there already, or from now on."""
    key = hashlib.sha256(" ".join((*_FLAGS, *sorted(flags))).encode())
    key.update(_version(compiler))
    for source in sorted((*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h"))):
        key.update(source.read_bytes())
    folder = cache_folder() / "kernels"
    target = folder / f"{key.hexdigest()[:32]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one compiles
        if not target.exists():
            _compile(compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    _log.info("compiling kernels for this processor, once")
    start_s = time.monotonic()
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        subprocess.run(
            [compiler, *_FLAGS, "-w", str(_FOLDER / "decoder.cpp"), "-o", str(part)],
            check=True,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
        os.replace(part, target)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        said = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        raise RuntimeError(f"{compiler} failed: {said}") from error
    finally:
        part.unlink(missing_ok=True)
    _log.info("kernels compiled in %.0f s", time.monotonic() - start_s)


def _version(compiler: str) -> bytes:
    command = [compiler, "-dumpfullversion", "-dumpversion"]
    return subprocess.run(command, check=True, capture_output=True, timeout=30).stdout
