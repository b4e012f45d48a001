"""Adapters as files: Hugging Face PEFT directories in and out, Microsoft's loralib in."""

from lorax_ft.interop.cards import ModelCard
from lorax_ft.interop.loralib import load_loralib
from lorax_ft.interop.peft import can_save, load_peft, save_peft
from lorax_ft.interop.pickles import read_torch

__all__ = ["ModelCard", "can_save", "load_loralib", "load_peft", "read_torch", "save_peft"]
