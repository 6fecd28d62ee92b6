"""RATTENTION (arXiv 2506.15545) in Equinox: layers, a language model, its training and its evaluation.

The ops and their kernels are in the package `pallas`. Commands: `rattn --help`. Names are imported when first used.
"""

import importlib

TYPE_CHECKING = False  # for type checkers alone; `typing` is slow to import
if TYPE_CHECKING:
    from rattn_eqx.inference.generate import generate
    from rattn_eqx.model import presets
    from rattn_eqx.model.attention import GlobalAttention, RAttention
    from rattn_eqx.model.block import Block
    from rattn_eqx.model.config import ModelConfig
    from rattn_eqx.model.language_model import LanguageModel
    from rattn_eqx.weights.load import load

__all__ = ["Block", "GlobalAttention", "LanguageModel", "ModelConfig", "RAttention", "generate", "load", "presets"]

_MODULES = {
    "Block": "model.block",
    "GlobalAttention": "model.attention",
    "LanguageModel": "model.language_model",
    "ModelConfig": "model.config",
    "RAttention": "model.attention",
    "generate": "inference.generate",
    "load": "weights.load",
    "presets": "model.presets",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"rattn_eqx.{_MODULES[name]}")
    globals()[name] = module if name == "presets" else getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
