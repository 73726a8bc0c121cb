"""The demo tokenizer: byte-level BPE trained on the few lines below, with the generation's added tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ming_rt.config import Generation
from ming_rt.demo.configs import TINY_BASE_VOCAB, special_tokens

# English contractions, words with one leading sign, single digits, signs, line ends, spaces.
PIECES = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

TEXT = """
The picture shows a red circle next to a blue square under a bright yellow sky, and a small green hill behind
the water. What do you hear in this recording? Someone speaks slowly, then a clear tone rises from low tones.
Please describe the video: the ball moves from left to right, bounces once and stops near the window.
It was early morning when the train left the station; people were reading, talking, looking out of windows.
She asked how many birds there were, and he answered that nobody could count them before they flew away again.
Every question deserves a short and honest answer, even if the answer is simply that we do not know yet.
First read the list of words, second write each of them on paper, third close the book and try to remember.
Large rooms sound different from little ones because walls return the voice later, softer and without edges.
My brother bought bread, cheese, apples, coffee and milk for the whole family on Saturday afternoon.
Numbers such as twelve, thirty, hundred and thousand are useful for time, money, weather and distance.
A good engineer measures twice, changes one thing, measures again, and keeps the notes for other engineers.
Rivers carry sand toward the ocean where strong waves build long beaches and quiet wind shapes the dunes.
Could you help me translate this sentence? Yes, of course, here is the translation into another language.
Music has rhythm and melody; drawing has lines and colour; cooking has smell, heat, patience and taste.
图片里有一个红色的圆和一个蓝色的方块，天空很亮。请描述这段视频，声音从低到高。你好，请问今天天气怎么样？
我们在早上坐火车去海边，看见很多鸟在水上飞。请把这句话翻译成英文，谢谢你的帮助，再见。
""".strip()


def write_tokenizer(directory: Path, generation: Generation) -> list[int]:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Returns the ids of the tokens that are whole printable characters by themselves.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_BASE_VOCAB,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    assert tokenizer.get_vocab_size() == TINY_BASE_VOCAB, "the text is too short for the vocabulary"

    tokens = special_tokens(generation)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {TINY_BASE_VOCAB + i: {"content": token, **flags} for i, token in enumerate(tokens)}
    body = json.loads(tokenizer.to_str())
    body["added_tokens"] = [{"id": i, **token} for i, token in added.items()]
    end = "<|role_end|>" if generation == "flash" else "<|endoftext|>"
    listed = [
        t for t in tokens if t in ("<role>", "</role>", "<|role_end|>") or "_start|>" in t or "_end|>" in t
    ]
    named = {
        "additional_special_tokens": list(dict.fromkeys(listed)),
        "bos_token": "<|startoftext|>",
        "cls_token": "[CLS]",
        "eos_token": end,
        "gmask_token": "[gMASK]",
        "pad_token": end,
    }
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "fast_tokenizer": True,
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "BailingTokenizer",
        **named,
    }
    for name, value in (
        ("tokenizer.json", body),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", named),
    ):
        (directory / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    texts = [tokenizer.decode([token]) for token in range(TINY_BASE_VOCAB)]
    return [token for token, text in enumerate(texts) if text.isprintable() and "\ufffd" not in text]
