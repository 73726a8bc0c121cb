"""Builds the native extensions of ming_rt with ninja.

``ming_rt._cpu`` is built everywhere and needs a C++17 compiler, pybind11 and ninja, but not torch;
``ming_rt._cuda`` is built where nvcc is found. ``MING_RT_MODULES`` chooses otherwise: a comma-separated list
of ``cpu``, ``cuda`` and ``emu`` (the CUDA sources compiled for the CPU, for tests). See csrc/README.md.
"""

import fcntl
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
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


NVCC_FLAGS = [
    "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "--expt-extended-lambda",
    "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]  # fmt: skip
# sm_80 code runs on every 8.x device, its PTX on those yet to come; sm_90a has Hopper's own instructions.
GENERAL_TARGETS = [
    "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=compute_80",
    "-gencode=arch=compute_90a,code=sm_90a",
]  # fmt: skip
# Those sources (csrc/ops/*/sm90) alone use CUTLASS.
HOPPER_FLAGS = [
    "-gencode=arch=compute_90a,code=sm_90a",
    include_flag("-isystem", ROOT / "third_party" / "cutlass" / "include"),
]


LEAST_CUDA = (12, 0)  # knows sm_90a


@functools.cache
def nvcc():
    """CUDA's compiler: $NVCC, $CUDA_HOME/bin, the PATH, the usual place; None without a recent one."""
    places = [
        os.environ.get("NVCC"),
        os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc"),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    path = next((found for place in places if place and (found := shutil.which(place))), None)
    if path is None:
        return None
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release (\d+)\.(\d+)", answer)
    if version is None or tuple(map(int, version.groups())) < LEAST_CUDA:
        print(f"{path} is not nvcc 12.0 or newer: the CUDA kernels are left out", file=sys.stderr)
        return None
    return path


@dataclass(frozen=True)
class Object:
    """One object file: its source, the ninja rule that compiles it, and flags beside the rule's own."""

    name: str
    source: Path
    rule: str = "cxx"
    flags: tuple = ()


def binding_objects(module, flags, leave_out=()):
    """The Python face of a module; ``$python``: include paths of Python and pybind11."""
    flags = (*flags, f"-DMING_MODULE={module}", "$python")
    for source in sorted(CSRC.glob("binding/*.cpp")):
        if source.stem not in leave_out:
            yield Object(f"binding_{source.stem}.o", source, flags=flags)


def cpu_objects():
    for source in sorted(CSRC.glob("common/*.cpp")):
        yield Object(f"common_{source.stem}.o", source)
    yield from binding_objects("_cpu", ["-DMING_BACKEND_CUDA=0"])
    # The baseline build is linked first: of an inline function that several builds emit, the linker keeps
    # the first copy, which must be one that every CPU can run.
    for isa, flags in ISA_FLAGS.items():
        if isa == "portable" or platform.machine() in ("x86_64", "AMD64"):
            for source in sorted(CSRC.glob("ops/*/*_cpu.cpp")):
                yield Object(f"{source.stem}_{isa}.o", source, flags=(*flags, f"-DMING_ISA={isa}"))


CPU_ONLY_BINDINGS = ("resize", "spectral")


def cuda_objects():
    yield from binding_objects("_cuda", ["-DMING_BACKEND_CUDA=1"], CPU_ONLY_BINDINGS)
    for source in [*sorted(CSRC.glob("common/*.cu")), *sorted(CSRC.glob("ops/**/*.cu"))]:
        targets = HOPPER_FLAGS if source.parent.name == "sm90" else GENERAL_TARGETS
        yield Object(f"{source.stem}.o", source, "nvcc", tuple(targets))


def emu_objects():
    flags = ("-DMING_EMU=1", "-DMING_BACKEND_CUDA=1", "-Wno-unknown-pragmas")
    yield from binding_objects("_emu", flags, CPU_ONLY_BINDINGS)
    yield Object("emu.o", CSRC / "emu" / "emu.cpp", flags=flags)
    for source in [*sorted(CSRC.glob("common/*.cu")), *sorted(CSRC.glob("ops/*/*.cu"))]:
        yield Object(f"{source.stem}.o", source, flags=(*flags, "-x c++"))


# The native modules and what they are linked from.
MODULES = {"cpu": cpu_objects, "cuda": cuda_objects, "emu": emu_objects}


def chosen_modules():
    """The modules of this build, as MING_RT_MODULES has it."""
    choice = os.environ.get("MING_RT_MODULES", "auto")
    if choice == "auto":
        return ["cpu", "cuda"] if nvcc() else ["cpu"]
    names = [name.strip() for name in choice.split(",")]
    if unknown := [name for name in names if name not in MODULES]:
        sys.exit(f"MING_RT_MODULES: found {unknown[0]!r}, expected auto or some of {', '.join(MODULES)}")
    if "cuda" in names and not nvcc():
        sys.exit("MING_RT_MODULES: cuda needs nvcc, on the PATH, in $CUDA_HOME/bin or named by $NVCC")
    return names


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
        module = ext.name.rsplit("._", 1)[-1]
        objects = list(MODULES[module]())
        edges = [
            f"build {o.name}: {o.rule} {ninja_escape(o.source)}\n  flags = {' '.join(o.flags)}"
            for o in objects
        ]
        # CUDA's run-time library goes in whole and hidden: it must not meet the one torch loads.
        linker = (
            "$nvcc -shared -cudart static -Xlinker --exclude-libs=ALL" if module == "cuda" else "$cxx -shared"
        )
        text = f"""
cxx = {os.environ.get("CXX", "c++")}
nvcc = {nvcc()}
python = {" ".join(python)}
common = {" ".join([*COMMON_FLAGS, *own])} {os.environ.get("CXXFLAGS", "")}
cuda = {" ".join([*NVCC_FLAGS, *own])}
rule cxx
  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CXX $out
rule nvcc
  command = $nvcc $cuda $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = NVCC $out
rule link
  command = {linker} $in -o $out -lpthread {os.environ.get("LDFLAGS", "")}
  description = LINK $out
{chr(10).join(edges)}
build {ninja_escape(target)}: link {" ".join(o.name for o in objects)}
default {ninja_escape(target)}
"""
        with open(build / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (build / "build.ninja").write_text(text)
            jobs = os.environ.get("MAX_JOBS")
            command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), *(["-j", jobs] if jobs else [])]
            if subprocess.run(command, check=False).returncode:
                hint = "; MING_RT_MODULES=cpu builds without CUDA kernels" if module == "cuda" else ""
                sys.exit(f"building {ext.name} failed{hint}")


setup(
    ext_modules=[Extension(f"ming_rt._{name}", sources=[]) for name in chosen_modules()],
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
