"""Arrays that travel in one buffer, and results read as they were when asked for."""

from __future__ import annotations

import numpy as np
import torch

from ming_rt.runtime import transfer

CPU = torch.device("cpu")
ARRAYS = [
    np.arange(5, dtype=np.int64),
    np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::2],
    np.empty(0, np.float32),
    np.array([[1.5], [2.5]], np.float32),
    np.array([3, 1, 2], np.uint8),
]


def test_sent_arrays_share_memory_on_the_cpu():
    sent = transfer.send(ARRAYS, CPU)
    for array, tensor in zip(ARRAYS, sent, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)
    assert sent[0].data_ptr() == ARRAYS[0].ctypes.data


def test_packed_arrays_arrive_whole_in_one_buffer():
    tensors = [torch.from_numpy(a) for a in ARRAYS]
    packed = transfer.pack(tensors, CPU)
    for tensor, view in zip(tensors, packed, strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)
        assert view.is_contiguous()
        assert view.data_ptr() % transfer.ALIGNMENT == packed[0].data_ptr() % transfer.ALIGNMENT
    assert len({view.untyped_storage().data_ptr() for view in packed}) == 1


def test_a_head_of_a_layout_ends_with_its_array():
    layout = transfer.Layout({"a": (torch.uint8, (3,)), "b": (torch.int64, (2, 2)), "c": (torch.int32, (1,))})
    assert (layout.end("a"), layout.end("b"), layout.end("c"), layout.nbytes) == (3, 48, 52, 64)


def test_fetched_results_do_not_follow_later_changes():
    first, second = torch.arange(3), torch.ones(2, 2)
    wait = transfer.fetch([first, second])
    first.zero_()
    second.zero_()
    assert [t.tolist() for t in wait()] == [[0, 1, 2], [[1.0, 1.0], [1.0, 1.0]]]
