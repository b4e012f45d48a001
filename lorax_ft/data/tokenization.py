"""Tokenizers: Hugging Face directories, `tokenizer.json`, SentencePiece models, used alike."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

# Any of these makes a directory one that `transformers` can read by itself.
HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """Texts as token ids, `[length]` int32 each, and how many had to be cut."""

    input_ids: list[np.ndarray]
    token_type_ids: list[np.ndarray] | None = None  # where the tokenizer tells two texts apart
    truncated: int = 0


class Tokenizer(Protocol):
    """What the tasks need of a tokenizer."""

    vocabulary_size: int
    pad_id: int
    eos_id: int | None

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        special_tokens: bool = True,
    ) -> Encoded:
        """Token ids of each text (or pair of texts), with special tokens, cut to `max_length`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        ...


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or hub id, a `tokenizer.json`, or a `.model` file.

    A directory that holds nothing but a SentencePiece `.model` file is read as that file: with the
    beginning-of-sequence token in front, where the model has one. Raises ValueError for a path that
    holds no tokenizer and OSError for a hub id that cannot be reached.
    """
    local = pathlib.Path(path).expanduser()
    if local.is_file() and local.suffix == ".json":
        fast = _transformers().PreTrainedTokenizerFast
        return HuggingFaceTokenizer(fast(tokenizer_file=str(local)))
    if local.is_file() and local.suffix == ".model":
        return SentencePieceTokenizer(local)
    if local.is_dir():
        models = sorted(local.glob("*.model"))
        if any((local / name).is_file() for name in HUGGING_FACE_FILES):
            return HuggingFaceTokenizer(_transformers().AutoTokenizer.from_pretrained(local))
        if len(models) == 1:
            return SentencePieceTokenizer(models[0])
    if local.exists():
        raise ValueError(
            f"{local} holds no tokenizer: expected a directory with one of "
            f"{', '.join(HUGGING_FACE_FILES)} or with one SentencePiece .model file, or a "
            "tokenizer.json or .model file itself."
        )
    try:
        return HuggingFaceTokenizer(_transformers().AutoTokenizer.from_pretrained(str(path)))
    except (OSError, ValueError) as error:
        raise OSError(
            f"No tokenizer at {str(path)!r}: it is no file or directory here, and as a Hugging "
            f"Face id it could not be loaded: {error}"
        ) from error


class HuggingFaceTokenizer:
    """A tokenizer of the `transformers` library."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.vocabulary_size: int = len(tokenizer)
        self.eos_id: int | None = tokenizer.eos_token_id
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(i for i in ids if i is not None)  # padding is masked: any id does

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        special_tokens: bool = True,
    ) -> Encoded:
        """Token ids; of a pair, the longer text is cut first, so that both keep their part."""

        def call(rows: Sequence[int], **truncation: Any) -> Any:
            return self.tokenizer(
                [texts[r] for r in rows],
                [pairs[r] for r in rows] if pairs is not None else None,
                add_special_tokens=special_tokens,
                return_attention_mask=False,
                return_token_type_ids=pairs is not None,
                verbose=False,
                **truncation,
            )

        if not texts:
            return Encoded(input_ids=[])
        whole = call(range(len(texts)))
        columns = {name: [np.array(v, np.int32) for v in whole[name]] for name in whole}
        ids = columns["input_ids"]
        long = [r for r, v in enumerate(ids) if max_length is not None and len(v) > max_length]
        if long:
            cut = call(long, truncation=True, max_length=max_length)
            for name, values in columns.items():
                for row, value in zip(long, cut[name]):
                    values[row] = np.array(value, np.int32)
        types = columns.get("token_type_ids")
        if types is not None and not any(v.any() for v in types):
            types = None  # a tokenizer that marks the second text in another way
        return Encoded(input_ids=ids, token_type_ids=types, truncated=len(long))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


class SentencePieceTokenizer:
    """A SentencePiece model, with the beginning-of-sequence token in front where it has one."""

    def __init__(self, path: str | os.PathLike[str]):
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(f"{path} needs sentencepiece: pip install sentencepiece") from error
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocabulary_size: int = self.processor.get_piece_size()
        bos, eos, pad = (self.processor.bos_id(), self.processor.eos_id(), self.processor.pad_id())
        self.bos_id: int | None = None if bos < 0 else bos
        self.eos_id: int | None = None if eos < 0 else eos
        self.pad_id: int = next(i for i in (pad, eos, 0) if i >= 0)

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        special_tokens: bool = True,
    ) -> Encoded:
        """Token ids. Raises ValueError for pairs, which such a model has no token to part with."""
        if pairs is not None:
            raise ValueError(
                "A SentencePiece model has no token that parts two texts: join the columns in the "
                "data, or use a tokenizer.json whose template does."
            )
        front = [self.bos_id] if special_tokens and self.bos_id is not None else []
        rows = [np.array(front + ids, np.int32) for ids in self.processor.encode(list(texts))]
        long = sum(max_length is not None and len(row) > max_length for row in rows)
        return Encoded(input_ids=[row[:max_length] for row in rows], truncated=long)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.processor.decode([int(i) for i in ids])


def _transformers() -> Any:
    """The library, kept from telling a user of JAX at every start that PyTorch is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
