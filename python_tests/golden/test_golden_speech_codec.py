"""Recorded conversions between BPE audio tokens and codec tokens, all exact."""

from __future__ import annotations

import torch
from golden_cases import golden_cases

from ming_rt import ops
from ming_rt.ops import AudioBpe


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
