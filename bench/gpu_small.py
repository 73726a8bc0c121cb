"""Every device op once or twice on small inputs, against the CPU: short enough for compute-sanitizer.

Run as ``python -m ming_rt.bench.gpu_small [cuda|emu|cpu] [TEXT]``; TEXT keeps the cases whose name holds it.
The exit status is 1 if a result differs or a case fails. Sizes have tails in every dimension and reach each
regime of the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from ming_rt import ops

from .gpu_timing import first_line

TOLERANCE = 2e-2  # |ours - CPU| / |CPU|; bfloat16 results
BF16 = torch.bfloat16


class Inputs:
    """Seeded tensors, the same on every device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
        """Unit normal times ``scale``."""
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype).to(self.device)

    def whole(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers."""
        return torch.tensor(values, dtype=dtype, device=self.device)


Small = Callable[[Inputs], object]


def norms(i: Inputs) -> object:
    """Both norms."""
    x, residual, weight = i.normal(5, 136), i.normal(5, 136), i.normal(136)
    return [*ops.rms_norm(x, weight, 1e-6, residual=residual), ops.layer_norm(x, weight, weight, 1e-5)]


def rope(i: Inputs) -> object:
    """Angles, rotation with the append (a padding row among the slots), the vision tower's rotation."""
    positions = torch.arange(15, dtype=torch.int32, device=i.device).view(3, 5)
    frequencies, axis = ops.inv_freq(600000.0, 64).to(i.device), ops.axis_table("3D", 32).to(i.device)
    cos, sin = ops.rope_table(positions, frequencies, axis)
    pages = [torch.zeros(2, 2, 8, 64, dtype=BF16, device=i.device) for _ in range(2)]
    slots = i.whole(3, -1, 9, 0, 15, dtype=torch.int64)
    weight = i.normal(64)
    q = ops.rope_append(i.normal(5, 8 * 64), cos, sin, *pages, slots, 4, weight, weight, 1e-6)
    qk = ops.rope_qk_(i.normal(5, 3 * 2 * 64), cos, sin, 2)
    return [cos, sin, q, *pages, qk]


def encoder_attention(i: Inputs) -> object:
    """Segments with tails, one of them empty."""
    cu = i.whole(0, 70, 70, 133)
    return [ops.attention_varlen(*(i.normal(133, 2, dim) for _ in range(3)), cu) for dim in (64, 80)]


def paged_attention(i: Inputs) -> object:
    """Decoding at several lengths, and a chunk of a prompt beside them."""
    k, v = i.normal(12, 2, 32, 128), i.normal(12, 2, 32, 128)
    table = i.whole(3, 1, 11, 0, 7, 2, 5, 9).view(2, 4)
    decode = ops.attention_paged(i.normal(2, 8, 128), k, v, table, i.whole(0, 1, 2), i.whole(33, 101))
    mixed = ops.attention_paged(i.normal(38, 8, 128), k, v, table, i.whole(0, 1, 38), i.whole(33, 101))
    return [decode, mixed]


def linear(rows: int, dtype: torch.dtype, quant: str | None = None) -> Small:
    """Plain and gated products."""

    def case(i: Inputs) -> object:
        # The CPU has no quantised weights; its reference is the plain product, hence few-bit inputs.
        chosen = quant if i.device == "cuda" or ops.is_emulating() else None
        w, up = (i.normal(104, 136, scale=0.1, dtype=dtype) for _ in range(2))
        if quant:
            w, up = w.sign() * 0.125, up.sign() * 0.125
        x = i.normal(rows, 136, dtype=dtype)
        bias = i.normal(104, dtype=dtype)
        plain = ops.linear(x, ops.pack_weight(w, dtype, quant=chosen), bias, act="gelu")
        if quant:
            return [plain]
        return [plain, ops.linear_swiglu(x, ops.pack_gate_up(w, up, dtype))]

    return case


def experts(tokens: int, skewed: bool) -> Small:
    """Route to combine; the counts per expert have tails, and with ``skewed`` empty experts."""

    def case(i: Inputs) -> object:
        hidden, width, count, top_k = 192, 136, 4, 2
        x = i.normal(tokens, hidden)
        routers = ops.RouterWeights(i.normal(2, count, hidden, scale=hidden**-0.5, dtype=torch.float32))
        modality = torch.arange(tokens, device=i.device).remainder(2).to(torch.uint8)
        routed = ops.moe_route(x, routers, modality, kind="softmax", top_k=top_k)
        # The products do not hang on the routing: a tie broken otherwise would change everything.
        first = torch.zeros(tokens) if skewed else torch.arange(tokens).remainder(count - 1)
        ids = torch.stack([first, first + 1], 1).to(torch.int32).to(i.device)
        packed = ops.pack_experts(count, hidden, width, BF16)
        for e in range(count):
            gate, up = (i.normal(width, hidden, scale=hidden**-0.5) for _ in range(2))
            packed.set(e, gate, up, i.normal(hidden, width, scale=width**-0.5))
        rows, offsets = ops.moe_permute(ids, count)
        h = ops.grouped_gemm_swiglu(x, rows, offsets, top_k, packed)
        y = ops.grouped_gemm_down(h, rows, offsets, packed)
        return [routed[1], routed[2], rows, offsets, h, y, ops.moe_combine(y, routed[1], x)]

    return case


def grouped_sigmoid(i: Inputs) -> object:
    """The router of flash."""
    weights, bias = i.normal(1, 16, 72, scale=0.1, dtype=torch.float32), i.normal(1, 16, dtype=torch.float32)
    x = i.normal(7, 72)
    found = ops.moe_route(
        x, ops.RouterWeights(weights, bias), kind="grouped_sigmoid", top_k=4, n_group=4, topk_group=2
    )
    return [found[1], found[2]]


def sampling(i: Inputs) -> object:
    """Greedy, filtered and penalised rows side by side."""
    floats = {"temperature": [0.0, 0.8, 1.0], "top_p": [1.0, 0.9, 1.0], "repetition_penalty": [1.0, 1.1, 1.3]}
    numbers = {"top_k": [0, 20, 0], "no_repeat_ngram_size": [0, 0, 2]}
    ids, logprob, _, top = ops.sample(
        i.normal(3, 1037, scale=4, dtype=torch.float32),
        **{name: torch.tensor(values, device=i.device) for name, values in floats.items()},
        **{name: i.whole(*values) for name, values in numbers.items()},
        history=i.whole(1, 2, 3, 1, 2, 5, 6, dtype=torch.int64),
        history_bounds=i.whole(0, 2, 2, 5, 3, 7, dtype=torch.int64).view(3, 2),
        uniforms=torch.tensor([0.1, 0.5, 0.9], device=i.device),
        n_logprobs=3,
    )
    return [ids[:1], logprob[:1], top]


def rest(i: Inputs) -> object:
    """Embedding, patches, and the bookkeeping between decode steps."""
    table, feats = i.normal(11, 72), i.normal(2, 72)
    ids = i.whole(3, 20, -1, 7, dtype=torch.int64)
    rows = ops.embed(ids, table, i.whole(1, 3, dtype=torch.int64), feats)
    frames = torch.randint(0, 256, (2, 56, 84, 3), generator=i.generator, dtype=torch.uint8).to(i.device)
    patches, _ = ops.patchify(frames, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    positions, lengths = i.whole(4, 7).repeat(3, 1), i.whole(4, 7)
    slots = i.whole(4, -1, dtype=torch.int64)
    history = torch.zeros(16, dtype=torch.int64, device=i.device)
    bounds, pages = i.whole(0, 4, 8, 15, dtype=torch.int64), i.whole(0, 1, 2, 3).view(2, 2)
    ops.advance(ids[:2], positions, lengths, slots, pages, history, bounds.view(2, 2), 8)
    return [rows, patches, positions, lengths, slots, history, bounds]


def audio_bpe(i: Inputs) -> object:
    """More ids than a block takes, special and unknown ones among them."""
    bpe = ops.AudioBpe.build(4, [(), (0,), (1,), (2, 3), (1, 2, 3, 0, 1)], [(1, 2, 3)]).to(i.device)
    ids = torch.randint(0, 7, (1100,), generator=i.generator).to(i.device)
    codes, cu_codes = ops.audio_bpe_decode(ids, i.whole(0, 1, 1, 700, 1100), bpe)
    return [codes[: int(cu_codes[-1])], cu_codes]


def vocoder(i: Inputs) -> object:
    """Its ops, with frames in phases and sizes that are no multiples of a block's."""
    f32 = torch.float32
    x, alpha = i.normal(3, 7, 20, dtype=f32), i.normal(20, dtype=f32)
    snake = ops.conv_frames([x, x], 19, act="snake", alpha=alpha, pad=(4, 4), dilation=2)
    f0, noise, mix = i.normal(5, scale=200, dtype=f32), i.normal(9, 5 * 63, dtype=f32), i.normal(9, dtype=f32)
    options = {"amplitude": 0.1, "sigma": 0.003, "threshold": 10.0}
    sources = [
        ops.sine_source(f0, noise, mix, mix[:1], 24000, interpolated=mode, **options)[0]
        for mode in (False, True)
    ]
    plan = ops.Stft.make(16, 4, i.device)
    wave = ops.istft(i.normal(140, 18, dtype=f32), plan, limit=100.0, bound=0.99, log_sine=True)
    return [snake, *sources, ops.stft(wave, plan), wave]


CASES: dict[str, Small] = {
    "norms": norms,
    "rope": rope,
    "encoder attention": encoder_attention,
    "paged attention": paged_attention,
    **{
        f"linear {rows} {str(dtype).removeprefix('torch.')}": linear(rows, dtype)
        for dtype in (BF16, torch.float32)
        for rows in (1, 9, 150)
    },
    **{f"linear {rows} {quant}": linear(rows, BF16, quant) for quant in ("int8", "int4") for rows in (2, 70)},
    "experts, few rows": experts(3, False),
    "experts, one hot": experts(37, True),
    "experts, some rows": experts(130, False),
    "experts, many rows": experts(520, False),
    "grouped sigmoid": grouped_sigmoid,
    "sampling": sampling,
    "the rest": rest,
    "audio tokens": audio_bpe,
    "vocoder": vocoder,
}


def tensors(found: object) -> Iterator[Tensor]:
    """All tensors of a result, on the CPU."""
    for item in found if isinstance(found, list | tuple) else [found]:
        yield item.cpu()


def difference(ours: Tensor, expected: Tensor) -> float:
    """``|ours - expected| / |expected|``; infinite for NaN or another shape."""
    if ours.shape != expected.shape:
        return float("inf")
    a, b = ours.double(), expected.double()
    value = float((a - b).norm() / b.norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def compare(case: Small, kind: str) -> float:
    """The largest difference among a case's results."""
    expected = list(tensors(case(Inputs("cpu"))))
    with ops.emulated() if kind == "emu" else nullcontext():
        found = list(tensors(case(Inputs("cuda" if kind == "cuda" else "cpu"))))
        if kind != "cpu":
            ops.check_device()
    return max(map(difference, found, expected))


def run(kind: str, only: str = "") -> int:
    """Runs the cases on "cuda", "emu" or "cpu"; prints a line each and returns how many differ."""
    wrong = 0
    for name, case in CASES.items():
        if only not in name:
            continue
        try:
            worst = compare(case, kind)
            good, text = worst <= TOLERANCE, f"{worst:.1e}"
        except Exception as error:
            good, text = False, f"{type(error).__name__}: {first_line(error)}"
        wrong += not good
        print(f"{name:<24} {'ok' if good else 'WRONG'} {text}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(1 if run(*(sys.argv[1:] or ["cuda"])) else 0)
