"""Tiny random models with their tokenizer and data, which runs from end to end are tried on."""

import jax
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from lorax_ft.models import BertConfig, LlamaConfig, build, hub

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "red",
    "blue",
    "green",
    "apple",
    "sky",
    "grass",
    "is",
    "the",
    "a",
    "not",
]
LABELS = {"red": "warm", "blue": "cold", "green": "cold"}


def write_folder(folder):
    """Tiny random models with their tokenizer, and data: the class of a text is its colour's."""
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": len(WORDS), "max_position_embeddings": 32}
    bert = build(BertConfig(**sizes), task="masked_lm")
    llama = build(LlamaConfig(**sizes, num_key_value_heads=1), task="causal_lm")
    for name, model in {"bert": bert, "llama": llama}.items():
        tokenizer.save_pretrained(folder / f"{name}_tokenizer")
        hub.save(
            folder / name,
            model,
            model.init(jax.random.key(0)),
            tokenizer_files_from=folder / f"{name}_tokenizer",
        )
    random = np.random.default_rng(0)
    rows = [random.choice(WORDS[4:], 6).tolist() for _ in range(400)]
    rows = [r for r in rows if len(colours := set(r) & set(LABELS)) == 1 or not r.append(colours)]
    rows = [r for r in rows if all(isinstance(w, str) for w in r)]
    lines = [f"{LABELS[(set(r) & set(LABELS)).pop()]},{' '.join(r)}" for r in rows]
    (folder / "data.csv").write_text("label,text\n" + "\n".join(lines) + "\n")
    (folder / "data.txt").write_text("\n".join("the sky is blue and" for _ in range(200)) + "\n")
    return folder
