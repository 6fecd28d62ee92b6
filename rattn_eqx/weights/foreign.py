"""What a checkpoint of another library holds, before it is a model of ours."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A checkpoint of another library, as a Hugging Face folder has it, whatever file it came from.

    config: as in Hugging Face's config.json ("model_type", "hidden_size", ...).
    shapes: of every tensor, by Hugging Face's name ("model.layers.0.self_attn.q_proj.weight") and in its layout,
      [out, in].
    read: one tensor by name, in its own dtype: ml_dtypes.bfloat16 for BF16, float32 for a quantised one.
    tokenizer: the text of tokenizer.json.
    chat_template: in Jinja.
    """

    source: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    tokenizer: str | None
    chat_template: str | None
