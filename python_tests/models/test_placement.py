"""Models compute where their weights are: run on meta tensors, which have no values and mix with no others.

A tensor left on the CPU, or a value read back in the middle of a step, fails here without any GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_omni import generations, media_prompt, omni_config

from ming_rt import ops
from ming_rt.models.omni import Omni
from ming_rt.runtime.batch import Batch
from ming_rt.runtime.weights import PlanSource

META = torch.device("meta")


def like(x, *shape, dtype=None):
    return torch.empty(shape or x.shape, dtype=dtype or x.dtype, device=META)


def rms_norm(x, weight, eps, *, weight_in_fp32, residual=None):
    return like(x) if residual is None else (like(x), like(x))


def route(x, routers, modality, *, top_k, **rest):
    shape = (len(x), top_k)
    f32 = torch.float32
    return (
        like(x, *shape, dtype=torch.int32),
        like(x, *shape, dtype=f32),
        like(x, len(x), routers.experts, dtype=f32),
    )


SHAPES = {
    "embed": lambda ids, table, rows, feats: like(table, len(ids), table.shape[1]),
    "linear": lambda x, w, bias=None, *, act=None, residual=None, out_dtype=None: like(
        x, len(x), w.n, dtype=out_dtype
    ),
    "linear_swiglu": lambda x, w, bias=None: like(x, len(x), w.n),
    "rms_norm": rms_norm,
    "layer_norm": lambda x, weight, bias, eps: like(x),
    "rope_table": lambda positions, frequencies, axis, scale=1.0: (
        like(frequencies, positions.shape[1], len(frequencies)),
        like(frequencies, positions.shape[1], len(frequencies)),
    ),
    "rope_qk_": lambda qkv, cos, sin, heads: qkv,
    "rope_append": lambda qkv, cos, sin, k, v, slots, heads, *norms: like(qkv, len(qkv), heads, k.shape[-1]),
    "attention_varlen": lambda q, k, v, cu_seqlens: like(q),
    "attention_paged": lambda q, k, v, table, cu_seqlens, lengths: like(q),
    "moe_route": route,
    "moe_permute": lambda ids, experts: (like(ids, ids.numel()), like(ids, experts + 1)),
    "grouped_gemm_swiglu": lambda x, rows, offsets, top_k, experts: like(x, len(rows), experts.width),
    "grouped_gemm_down": lambda h, rows, offsets, experts: like(h, len(rows), experts.hidden),
    "moe_combine": lambda y, weights, shared=None: like(y, len(weights), y.shape[1]),
}


@pytest.fixture(autouse=True)
def shapes_only(monkeypatch):
    """Ops give tensors of the right shape, and refuse what is not on the models' device."""

    def placed(name, shape):
        def op(*args, **options):
            for value in (*args, *options.values()):
                parts = vars(value).values() if hasattr(value, "__dict__") else [value]
                for tensor in [value, *parts]:
                    assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, f"{name} got {tensor}"
            return shape(*args, **options)

        return op

    for name, shape in SHAPES.items():
        monkeypatch.setattr(ops, name, placed(name, shape))


@generations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_prompt_stays_on_the_device(generation, dtype):
    config = omni_config(generation)
    model = Omni(config, PlanSource(dtype=dtype))
    for encoder in model.audio:
        prompt = media_prompt(config, encoder)
        plan, media = model.plan(prompt), model.encode(prompt)
        assert media is not None
        assert media.feats.is_meta
        assert media.feats.dtype == dtype
        thinker, count = config.thinker, len(prompt.input_ids)
        pages = [
            torch.empty(4, thinker.num_key_value_heads, 32, thinker.head_dim, device=META)
            for _ in range(thinker.num_hidden_layers)
        ]
        host = {
            "input_ids": prompt.input_ids,
            "positions": plan.positions,
            "slots": range(count),
            "page_table": [[0, 1]],
            "cu_seqlens_q": [0, count],
            "kv_lens": [count],
            "logit_rows": [count - 1],
            "modality": plan.modality,
            "media_rows": media.rows,
        }
        batch = Batch(
            **{name: torch.as_tensor(value).to(META) for name, value in host.items()},
            media_feats=media.feats,
            want_hidden=True,
        )
        out = model.thinker.forward(batch, SimpleNamespace(k=pages, v=pages))
        assert out.logits.shape == (1, thinker.vocab_size)
        assert all(x.is_meta for x in (out.logits, out.hidden0, out.hidden_last))
