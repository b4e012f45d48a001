"""Bases that need no file: random weights that follow from a tensor's name and shape alone."""

import zlib

import numpy as np

# Configs of bases for real adapters, as config.json has them. Sizes that the adapters do not touch
# are small.
CONFIGS = {
    "bert": {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": 40,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2ForSequenceClassification"],
        "vocab_size": 40,
        "n_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
    "gpt2_tiny": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 40,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
}
IDS = np.array([[5, 9, 17, 3, 28, 11], [8, 2, 39, 21, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.int32)


def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of that name; a norm's scale lies near one."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    is_scale = len(shape) == 1 and name.endswith("weight")
    return random.standard_normal(shape, np.float32) * np.float32(0.04) + np.float32(is_scale)
