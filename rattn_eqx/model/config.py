"""What fixes a model's shapes and mathematics, as a frozen value that a run folder stores as JSON."""

import dataclasses
from typing import Literal

from rattn_eqx.model.fields import settle
from rattn_eqx.model.map_files import MAPS, is_of_file
from rattn_eqx.model.rotary import RopeScaling

LayerKind = Literal["local", "global", "global_rope"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a `LanguageModel`'s shapes and mathematics.

    `pattern` is repeated down the layers: a "local" layer is `RAttention`, a "global" one is `GlobalAttention` without
    positions, "global_rope" one with rotary positions.
    `window` counts the keys that a local layer's query sees, itself included; 0 leaves linear attention alone.
    `residual=False` takes the residual branch away: a plain sliding-window layer.
    `swa_gain` and `rla_gain` are what the learned gains of the two branches begin at; `swa_gain=None` leaves the
    window's branch without norm and gain. `sinks` gives each head of a local layer a learned logit without a value.
    `feature_projection` gives each head of the residual branch a learned matrix before the map.
    `feature_map` is a named one of `pallas.feature_map`; "learned", a `Hedgehog` of each local layer's own; or one of a
    user's file, as `map_files.read_map` names it.

    What models of other libraries have: `qkv_bias`, biases of queries, keys and values; `norm_eps`, of the stream's
    norms and of qk-norm; `embedding_scale`, what embeddings are multiplied by (None: the square root of the width);
    `rope_scaling`, slower rotary frequencies.
    """

    vocabulary_size: int
    model_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    feed_forward_width: int
    window: int
    pattern: tuple[LayerKind, ...] = ("local", "local", "local", "global")
    residual: bool = True
    feature_map: str = "softmax"
    learned_feature_scale: bool = False
    num_meta_tokens: int = 0
    swa_gain: float | int | None = 1.0
    rla_gain: float | int = 1.0
    qk_norm: bool = True
    rope_theta: float | int = 5e5
    gate: Literal["gelu", "silu"] = "gelu"
    tie_embeddings: bool = True
    qkv_bias: bool = False
    norm_eps: float | int = 1e-6
    embedding_scale: float | int | None = None
    rope_scaling: RopeScaling | None = None
    sinks: bool = False
    feature_projection: bool = False

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, from the first to the last: the pattern, repeated."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.num_layers))

    def room(self, length: int) -> int | None:
        """What a cache needs for documents of that length: None where no layer keeps every token."""
        return length if set(self.layer_kinds) - {"local"} else None

    def __post_init__(self):
        settle(self)
        if not self.pattern:
            raise ValueError(
                "ModelConfig: pattern must name a layer kind; got none; give ('local', 'local', 'local', 'global')"
            )
        sizes = ("vocabulary_size", "model_width", "num_layers", "num_heads", "num_kv_heads", "head_size")
        for name in (*sizes, "feed_forward_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: {name} must be at least 1; got {getattr(self, name)}")
        if self.window < 0:
            raise ValueError(
                f"ModelConfig: window must be at least 0; got window={self.window}; "
                "it counts keys, the query's own included"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "ModelConfig: num_heads must be a multiple of num_kv_heads; "
                f"got num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}; "
                "each key/value head serves an equal group of query heads"
            )
        if self.norm_eps < 0:
            raise ValueError(f"ModelConfig: norm_eps must be at least 0; got {self.norm_eps}")
        if self.head_size % 2:
            raise ValueError(f"ModelConfig: head_size must be even, for rotary embedding; got {self.head_size}")
        if self.feature_map not in MAPS and not is_of_file(self.feature_map):
            raise ValueError(
                f"ModelConfig: feature_map must be one of {', '.join(MAPS)}, or what map_files.read_map gives of a "
                f"file's; got {self.feature_map!r:.200}"
            )
