"""Makes generation.json: what transformers writes with the tiny checkpoints of models/.

Run with torch 2.13 (CPU) and transformers 5.24, which the project itself does not need:

    python tests/golden/make_generation.py

The texts are of three lengths, padded on the left. Several tokens end a text, so that some texts
end early; what follows them is padding.
"""

import json
import pathlib

import torch
import transformers

HERE = pathlib.Path(__file__).parent
CASES = (
    *("gpt2_causal_lm", "llama_llama3", "mistral_causal_lm", "qwen2_causal_lm"),
    *("qwen3_causal_lm", "gemma_causal_lm", "gemma2_causal_lm", "t5_seq2seq_lm"),
    "t5_gated_seq2seq_lm",
)
PAD, ENDS = 0, (2, 17, 31, 44)
IDS = [[5, 33, 12, 48, 7, 21, 9], [PAD, PAD, PAD, 41, 8, 26, 13], [PAD, PAD, PAD, PAD, PAD, 3, 50]]
SETTINGS = (
    {"max_new_tokens": 12},
    {"max_new_tokens": 8, "num_beams": 3},
    {"max_new_tokens": 12, "num_beams": 4, "length_penalty": 2.0},
    {"max_new_tokens": 12, "num_beams": 2, "length_penalty": -1.0, "early_stopping": True},
    {"max_new_tokens": 12, "num_beams": 3, "early_stopping": "never"},
)


def main() -> None:
    ids = torch.tensor(IDS)
    mask = (ids != PAD).long()
    cases = []
    for name in CASES:
        is_t5 = name.startswith("t5")
        kind = (
            transformers.T5ForConditionalGeneration if is_t5 else transformers.AutoModelForCausalLM
        )
        model = kind.from_pretrained(HERE / "models" / name).eval()
        for settings in SETTINGS:
            written = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                use_cache=not is_t5,  # transformers' has as many layers as the encoder
                pad_token_id=PAD,
                eos_token_id=list(ENDS),
                **settings,
            )[:, 1 if is_t5 else ids.shape[1] :]
            cases.append({"model": name, "settings": settings, "tokens": written.tolist()})
    header = {"input_ids": IDS, "pad_token_id": PAD, "eos_token_id": ENDS}
    lines = ",\n".join(json.dumps(case) for case in cases)
    text = json.dumps(header)[:-1] + f', "cases": [\n{lines}\n]}}\n'
    (HERE / "generation.json").write_text(text)


if __name__ == "__main__":
    main()
