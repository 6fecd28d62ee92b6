"""RATTENTION (arXiv 2506.15545) in Equinox: layers, a language model, its training and its evaluation.

The ops and their kernels are in the package `pallas`. Commands: `rattn --help`.
"""

from rattn_eqx import presets
from rattn_eqx.attention import GlobalAttention, RAttention
from rattn_eqx.block import Block
from rattn_eqx.language_model import LanguageModel

__all__ = ["Block", "GlobalAttention", "LanguageModel", "RAttention", "presets"]
