"""Data: readers, splits, tokenizers, tasks, and batches of static shapes."""

from lorax_ft.data.baseline import tfidf_baseline
from lorax_ft.data.dataset import DataConfig, Dataset, check_fits, load_dataset
from lorax_ft.data.loader import (
    LoaderConfig,
    TrainBatches,
    TrainSteps,
    evaluation_batches,
    make_batch,
    padding_share,
    plan_epoch,
)
from lorax_ft.data.readers import SourceConfig, read
from lorax_ft.data.splits import SplitConfig, read_splits
from lorax_ft.data.table import Table
from lorax_ft.data.tasks import (
    LanguageModelling,
    PromptCompletion,
    SequenceToSequence,
    TextClassification,
    encode_sources,
    label_texts,
    make_examples,
    source_of,
)
from lorax_ft.data.tokenization import Tokenizer, load_tokenizer

__all__ = [
    "DataConfig",
    "Dataset",
    "LanguageModelling",
    "LoaderConfig",
    "PromptCompletion",
    "SequenceToSequence",
    "SourceConfig",
    "SplitConfig",
    "Table",
    "TextClassification",
    "Tokenizer",
    "TrainBatches",
    "TrainSteps",
    "check_fits",
    "encode_sources",
    "evaluation_batches",
    "label_texts",
    "load_dataset",
    "load_tokenizer",
    "make_batch",
    "make_examples",
    "padding_share",
    "plan_epoch",
    "read",
    "read_splits",
    "source_of",
    "tfidf_baseline",
]
