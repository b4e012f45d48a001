"""Texts that a language model writes: greedy, drawn, by beam search; whole or as they come."""

from lorax_ft.generation.choosing import GenerationConfig, restrict
from lorax_ft.generation.writing import ends_of, generate, stream

__all__ = ["GenerationConfig", "ends_of", "generate", "restrict", "stream"]
