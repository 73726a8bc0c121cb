"""ming_rt: a C++ runtime for inclusionAI's Ming omni-modal models.

    import ming_rt
    with ming_rt.load("path/to/checkpoint") as m:
        print(m.chat([{"role": "user", "content": "Hello"}]).text)

Names that need torch are resolved on first use, so that ``import ming_rt`` itself stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ming_rt import errors
from ming_rt.errors import (
    CapacityError,
    ConfigError,
    EngineClosedError,
    EngineError,
    InvalidMediaError,
    InvalidRequestError,
    MingError,
    TokenizerError,
    UnsupportedError,
    WeightsError,
)

if TYPE_CHECKING:
    from ming_rt.inputs.limits import Limits
    from ming_rt.pipelines.events import (
        Done,
        Event,
        Hidden,
        TextDelta,
        Timings,
        TokenLogprob,
        Transcript,
        Usage,
    )
    from ming_rt.pipelines.session import Session, SessionInfo, load
    from ming_rt.runtime.handle import Handle
    from ming_rt.runtime.options import EngineStats
    from ming_rt.runtime.request import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "Done": "pipelines.events",
    "EngineStats": "runtime.options",
    "Event": "pipelines.events",
    "Handle": "runtime.handle",
    "Hidden": "pipelines.events",
    "Limits": "inputs.limits",
    "SamplingParams": "runtime.request",
    "Session": "pipelines.session",
    "SessionInfo": "pipelines.session",
    "TextDelta": "pipelines.events",
    "Timings": "pipelines.events",
    "TokenLogprob": "pipelines.events",
    "Transcript": "pipelines.events",
    "Usage": "pipelines.events",
    "load": "pipelines.session",
}
__all__ = [
    "CapacityError",
    "ConfigError",
    "Done",
    "EngineClosedError",
    "EngineError",
    "EngineStats",
    "Event",
    "Handle",
    "Hidden",
    "InvalidMediaError",
    "InvalidRequestError",
    "Limits",
    "MingError",
    "SamplingParams",
    "Session",
    "SessionInfo",
    "TextDelta",
    "Timings",
    "TokenLogprob",
    "TokenizerError",
    "Transcript",
    "UnsupportedError",
    "Usage",
    "WeightsError",
    "__version__",
    "errors",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ming_rt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ming_rt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
