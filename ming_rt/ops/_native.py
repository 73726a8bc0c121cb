"""The compiled kernels, or one sentence that says why they are missing."""

from __future__ import annotations

try:
    from ming_rt import _cpu as cpu
except ImportError as error:
    raise ImportError(
        f"ming_rt has no compiled kernels here ({error}); install it with `pip install .`, or with "
        "`pip install -e .` to run from the source tree"
    ) from error

__all__ = ["cpu"]
