"""RATTENTION (arXiv 2506.15545) in Equinox: layers, a language model, its training and its evaluation.

The ops and their kernels are in the package `pallas`. Commands: `rattn --help`.
"""

from rattn_eqx.inference.generate import generate
from rattn_eqx.model import presets
from rattn_eqx.model.attention import GlobalAttention, RAttention
from rattn_eqx.model.block import Block
from rattn_eqx.model.config import ModelConfig
from rattn_eqx.model.language_model import LanguageModel

__all__ = ["Block", "GlobalAttention", "LanguageModel", "ModelConfig", "RAttention", "generate", "presets"]
