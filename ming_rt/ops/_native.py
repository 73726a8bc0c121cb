"""The compiled kernels, or one sentence that says why they are missing."""

from __future__ import annotations

try:
    from ming_rt import _cpu as cpu
except ImportError as error:
    raise ImportError(
        f"ming_rt was installed without its native extension ({error}); reinstall it with `pip install .`"
    ) from error

__all__ = ["cpu"]
