"""ming_rt: a C++/CUDA runtime for inclusionAI's Ming omni-modal models.

    import ming_rt
    with ming_rt.load("path/to/checkpoint") as m:
        print(m.chat([{"role": "user", "content": "Hello"}]).text)

Public names are resolved on first use, so that ``import ming_rt`` itself stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ming_rt.pipelines.events import Done, TextDelta
    from ming_rt.pipelines.session import Session, load
    from ming_rt.runtime.request import SamplingParams

_HOMES = {
    "load": "ming_rt.pipelines.session",
    "Session": "ming_rt.pipelines.session",
    "TextDelta": "ming_rt.pipelines.events",
    "Done": "ming_rt.pipelines.events",
    "SamplingParams": "ming_rt.runtime.request",
    "errors": "ming_rt.errors",
}
__all__ = ["Done", "SamplingParams", "Session", "TextDelta", "__version__", "errors", "load"]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'ming_rt' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name == "errors" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
