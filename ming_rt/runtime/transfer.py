"""Small arrays between the host and a device without waiting: one copy in, one event out.

Pinned memory comes from torch's host allocator, which gives a block out again only after the copies that use
it have run: taking a new one for every transfer is what rotating buffers would be, and costs no allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

CPU = torch.device("cpu")
ALIGNMENT = 16  # bytes, of every array in a shared buffer


class Layout:
    """Named arrays side by side in one buffer: dtype and shape of each."""

    def __init__(self, fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._fields: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}
        self.nbytes = 0
        for name, (dtype, shape) in fields.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            self._fields[name] = (self.nbytes, self.nbytes + size, dtype, shape)
            self.nbytes += -(-size // ALIGNMENT) * ALIGNMENT

    def end(self, name: str) -> int:
        """Bytes of the buffer up to and with the array ``name``."""
        return self._fields[name][1]

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The arrays inside ``buffer`` (u8 ``[nbytes]``)."""
        return {
            name: buffer[begin:end].view(dtype).view(shape)
            for name, (begin, end, dtype, shape) in self._fields.items()
        }


def host_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """u8 ``[nbytes]`` of host memory that copies to and from ``device`` need not wait for."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays on ``device``, in stream order; on the CPU the tensors share the arrays' memory."""
    tensors = [torch.from_numpy(a) for a in arrays]
    return tensors if device.type == "cpu" else pack(tensors, device)


def pack(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The tensors on ``device`` as views of one buffer that travels in one copy."""
    layout = Layout({str(i): (t.dtype, tuple(t.shape)) for i, t in enumerate(tensors)})
    host = host_buffer(layout.nbytes, device)
    for view, tensor in zip(layout.views(host).values(), tensors, strict=True):
        view.copy_(tensor)
    return list(layout.views(host.to(device, non_blocking=True)).values())


def fetch(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Begin to copy tensors to the host as they are now in stream order; the result waits for them.

    At least one tensor, all of one device.
    """
    cuda = tensors[0].is_cuda
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=cuda) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    if not cuda:
        return lambda: copies
    event = torch.cuda.Event(blocking=True)  # leaves the core to those who read the answers
    event.record()

    def wait() -> list[torch.Tensor]:
        event.synchronize()
        return copies

    return wait
