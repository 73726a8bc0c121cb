"""Recorded conversions of BPE audio tokens, and of the archives that the weights come in, all exact."""

from __future__ import annotations

import torch
from golden_cases import golden_cases
from safetensors import safe_open

from ming_rt import ops
from ming_rt.ops import AudioBpe
from ming_rt.runtime.convert import convert


@golden_cases(lambda case: case.has("char_mapping.txt", "tokenizer.json", "cases.json"))
def test_audio_bpe(case, backend):
    host = AudioBpe.from_dir(case.path)
    bpe = host.to(torch.empty(0).device)
    recorded = case.json("cases.json")
    for record in recorded["encode"]:
        ids = host.encode(record["codes"])
        assert ids.tolist() == record["bpe_ids"], record["name"]
        assert bpe.decode(ids).tolist() == record["roundtrip_codes"], record["name"]
    for record in recorded["decode"]:
        assert bpe.decode(record["bpe_ids"]).tolist() == record["codes"], record["name"]
        assert [code for i in record["bpe_ids"] for code in bpe.codes_of(i)] == record["codes"]
    rows = [record["bpe_ids"] for record in recorded["decode"]]
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    codes, cu_codes = ops.audio_bpe_decode(torch.tensor([i for row in rows for i in row]), ends, bpe)
    assert codes[: int(cu_codes[-1])].tolist() == [
        c for record in recorded["decode"] for c in record["codes"]
    ]
    assert cu_codes.diff().tolist() == [len(record["codes"]) for record in recorded["decode"]]


@golden_cases(lambda case: case.has("hift_v2.pt", "outputs.safetensors"))
def test_archives(case, tmp_path):
    """Recorded are some tensors of each archive, the vocoder's under names without its prefix."""
    convert(case.path, tmp_path)
    archives = {"flow": "flow_other", "hift": "hift_v2", "spk": "luna_v2", "dtypes": "dtypes"}
    parts = {part: safe_open(tmp_path / f"{name}.safetensors", "pt") for part, name in archives.items()}
    single = safe_open(tmp_path / "luna_preview.safetensors", "pt")
    for name, expected in case.outputs.items():
        part, _, key = name.partition(".")
        found = parts[part].get_tensor(key) if key else single.get_tensor("vp_emb")
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name
    assert parts["spk"].metadata() == {"prompt_text": case.config["spk_prompt_text"]}
    assert len(parts["hift"].keys()) == case.config["hift_key_count"]
    assert not any("generator" in name for name in parts["hift"].keys())  # noqa: SIM118
