"""Builds the native extension of ming_rt with ninja.

``ming_rt._cpu`` is built everywhere and needs a C++17 compiler, pybind11 and ninja, but not torch. Every
``csrc/ops/*/*_cpu.cpp`` is compiled once per instruction set (see csrc/README.md).
"""

import fcntl
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

COMMON_FLAGS = [
    "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fno-math-errno",
    "-Wall", "-Wextra", "-Werror=return-type",
]  # fmt: skip
# gcc 12 reports its own intrinsics headers as possibly uninitialised.
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-march=x86-64-v3", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
    "avx512": [
        "-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512",
        "-Wno-uninitialized", "-Wno-maybe-uninitialized",
    ],
}  # fmt: skip


def ninja_escape(path):
    """A path in a build line; ninja itself quotes it for the shell."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def include_flag(flag, path):
    """An option with a path, quoted for the shell, in a ninja variable."""
    return f"{flag} {shlex.quote(str(path))}".replace("$", "$$")


def cpu_objects(python):
    """(source, object file, flags) of each object in ``ming_rt._cpu``; ``python``: the binding's includes."""
    for source in sorted(CSRC.glob("common/*.cpp")):
        yield source, f"common_{source.stem}.o", []
    for source in sorted(CSRC.glob("binding/*.cpp")):
        yield source, f"binding_{source.stem}.o", python
    # The baseline build is linked first: of an inline function that several builds emit, the linker keeps
    # the first copy, which must be one that every CPU can run.
    for isa, flags in ISA_FLAGS.items():
        if isa == "portable" or platform.machine() in ("x86_64", "AMD64"):
            for source in sorted(CSRC.glob("ops/*/*_cpu.cpp")):
                yield source, f"{source.stem}_{isa}.o", [*flags, f"-DMING_ISA={isa}"]


# Native modules and what they are linked from. A module that needs another compiler joins here, under the
# condition that the compiler exists.
MODULES = {"ming_rt._cpu": cpu_objects}


class NinjaBuild(build_ext):
    """Compiles csrc/ through a generated build.ninja: parallel, incremental, with header dependencies."""

    def build_extension(self, ext):
        import ninja
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        tag = f"{ext.name}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = ROOT / "build" / f"ninja-{tag}"
        build.mkdir(parents=True, exist_ok=True)

        own = [include_flag("-I", p) for p in (CSRC, ROOT / "third_party")]
        python = [
            include_flag("-isystem", p) for p in (pybind11.get_include(), sysconfig.get_path("include"))
        ]
        objects, edges = [], []
        for source, name, flags in MODULES[ext.name](python):
            objects.append(name)
            edges.append(f"build {name}: cxx {ninja_escape(source)}\n  flags = {' '.join(flags)}")

        cxx = os.environ.get("CXX", "c++")
        text = f"""
cxx = {cxx}
common = {" ".join([*COMMON_FLAGS, *own])} {os.environ.get("CXXFLAGS", "")}
rule cxx
  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CXX $out
rule link
  command = $cxx -shared $in -o $out -lpthread {os.environ.get("LDFLAGS", "")}
  description = LINK $out
{chr(10).join(edges)}
build {ninja_escape(target)}: link {" ".join(objects)}
default {ninja_escape(target)}
"""
        with open(build / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (build / "build.ninja").write_text(text)
            jobs = os.environ.get("MAX_JOBS")
            command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), *(["-j", jobs] if jobs else [])]
            subprocess.run(command, check=True)


setup(
    ext_modules=[Extension(name, sources=[]) for name in MODULES],
    cmdclass={"build_ext": NinjaBuild},
    packages=[
        "ming_rt",
        "ming_rt.bench",
        "ming_rt.bench.ops",
        *(f"ming_rt.{p.parent.name}" for p in sorted(ROOT.glob("ming_rt/*/__init__.py"))),
    ],
    # The benches live at the top level but ship with the package, so that `ming-rt bench` works anywhere.
    package_dir={"ming_rt.bench": "bench"},
)
