"""The families of encoders: names, defaults, and what each computes otherwise than BERT.

RoBERTa is Liu et al. 2019, DistilBERT Sanh et al. 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax_ft.models.hugging_face import Names, Tables

BERT_NAMES: Names = {
    "embeddings/word": "bert.embeddings.word_embeddings",
    "embeddings/position": "bert.embeddings.position_embeddings",
    "embeddings/token_type": "bert.embeddings.token_type_embeddings",
    "embeddings/norm": "bert.embeddings.LayerNorm",
    "layers/attention/query": "bert.encoder.layer.{layer}.attention.self.query",
    "layers/attention/key": "bert.encoder.layer.{layer}.attention.self.key",
    "layers/attention/value": "bert.encoder.layer.{layer}.attention.self.value",
    "layers/attention/output": "bert.encoder.layer.{layer}.attention.output.dense",
    "layers/attention_norm": "bert.encoder.layer.{layer}.attention.output.LayerNorm",
    "layers/mlp/up": "bert.encoder.layer.{layer}.intermediate.dense",
    "layers/mlp/down": "bert.encoder.layer.{layer}.output.dense",
    "layers/mlp_norm": "bert.encoder.layer.{layer}.output.LayerNorm",
    "pooler": "bert.pooler.dense",
    "classifier": "classifier",
    "lm_head/transform": "cls.predictions.transform.dense",
    "lm_head/norm": "cls.predictions.transform.LayerNorm",
    "lm_head": "cls.predictions",
}

ROBERTA_NAMES: Names = {
    **{
        path: name.replace("bert.", "roberta.", 1)
        for path, name in BERT_NAMES.items()
        if name.startswith("bert.")
    },
    "classifier/dense": "classifier.dense",  # where sequences are classified
    "classifier/projection": "classifier.out_proj",
    "classifier": "classifier",  # where tokens are
    "lm_head/transform": "lm_head.dense",
    "lm_head/norm": "lm_head.layer_norm",
    "lm_head": "lm_head",
}

DISTILBERT_NAMES: Names = {
    "embeddings/word": "distilbert.embeddings.word_embeddings",
    "embeddings/position": "distilbert.embeddings.position_embeddings",
    "embeddings/norm": "distilbert.embeddings.LayerNorm",
    "layers/attention/query": "distilbert.transformer.layer.{layer}.attention.q_lin",
    "layers/attention/key": "distilbert.transformer.layer.{layer}.attention.k_lin",
    "layers/attention/value": "distilbert.transformer.layer.{layer}.attention.v_lin",
    "layers/attention/output": "distilbert.transformer.layer.{layer}.attention.out_lin",
    "layers/attention_norm": "distilbert.transformer.layer.{layer}.sa_layer_norm",
    "layers/mlp/up": "distilbert.transformer.layer.{layer}.ffn.lin1",
    "layers/mlp/down": "distilbert.transformer.layer.{layer}.ffn.lin2",
    "layers/mlp_norm": "distilbert.transformer.layer.{layer}.output_layer_norm",
    "pooler": "pre_classifier",
    "classifier": "classifier",
    "lm_head/transform": "vocab_transform",
    "lm_head/norm": "vocab_layer_norm",
    "lm_head": "vocab_projector",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One family: what Hugging Face calls its parts, and how it differs from BERT."""

    tables: Tables

    # Defaults of config fields, where transformers has others for this family than for BERT.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    # What config.json calls our fields, where it is not the same; None: it has no such field.
    field_names: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    # Further entries of config.json: with the values at which they change nothing, or harmless.
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()

    has_token_types: bool = True
    skips_padding: bool = False  # positions count what is not padding, from pad_token_id + 1
    encoder_has_pooler: bool = True
    pooler_act: str = "tanh"
    has_dense_classifier: bool = False  # sequences: dense, tanh and a projection, without pooler
    classifier_dropout_of_tokens: bool = True  # hidden_dropout_prob before tokens' where False
    lm_head_act: str | None = None  # hidden_act where None


def _tables(family: str, prefix: str, names: Names, **others: Any) -> Tables:
    tasks = {
        f"{family}Model": "encoder",
        f"{family}ForSequenceClassification": "sequence_classification",
        f"{family}ForTokenClassification": "token_classification",
        f"{family}ForMaskedLM": "masked_lm",
        f"{family}ForPreTraining": "masked_lm",
    }
    heads = ("pooler", "classifier", "lm_head")
    return Tables(prefix=prefix, names=names, tasks=tasks, heads=heads, new_heads=heads, **others)


VARIANTS: Mapping[str, Variant] = {  # by config.json's model_type
    "bert": Variant(
        tables=_tables(
            "Bert",
            "bert.",
            BERT_NAMES,
            foreign=(
                "bert.embeddings.position_ids",
                "bert.embeddings.token_type_ids",
                "cls.seq_relationship.weight",
                "cls.seq_relationship.bias",
            ),
            tied={
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
            # as in checkpoints converted from TensorFlow
            old_suffixes={
                "LayerNorm.gamma": "LayerNorm.weight",
                "LayerNorm.beta": "LayerNorm.bias",
            },
        ),
        neutral={"position_embedding_type": ("absolute",), "tie_word_embeddings": (True,)},
        harmless=(
            "bos_token_id",
            "eos_token_id",
            "directionality",
            # written by Google's converter of the multilingual checkpoints; nothing reads them
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        ),
    ),
    "roberta": Variant(
        tables=_tables(
            "Roberta",
            "roberta.",
            ROBERTA_NAMES,
            foreign=("roberta.embeddings.position_ids", "roberta.embeddings.token_type_ids"),
            tied={
                "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
                "lm_head.decoder.bias": "lm_head.bias",
            },
        ),
        defaults={"vocab_size": 50265, "pad_token_id": 1},
        neutral={"position_embedding_type": ("absolute",), "tie_word_embeddings": (True,)},
        harmless=("bos_token_id", "eos_token_id"),
        skips_padding=True,
        has_dense_classifier=True,
        lm_head_act="gelu",
    ),
    "distilbert": Variant(
        tables=_tables(
            "DistilBert",
            "distilbert.",
            DISTILBERT_NAMES,
            foreign=("distilbert.embeddings.position_ids",),
            tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        ),
        defaults={"num_hidden_layers": 6, "classifier_dropout": 0.2},
        field_names={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
            "classifier_dropout": "seq_classif_dropout",
            "layer_norm_eps": None,
            "type_vocab_size": None,
        },
        neutral={
            "sinusoidal_pos_embds": (False,),
            "tie_weights_": (True,),
            "tie_word_embeddings": (True,),
        },
        harmless=("bos_token_id", "eos_token_id", "qa_dropout"),
        has_token_types=False,
        encoder_has_pooler=False,
        pooler_act="relu",
        classifier_dropout_of_tokens=False,
    ),
}
