"""One layer of a language model: attention and feed-forward, each behind a norm and added to the stream."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pallas import StepCache
from pallas.checked import checked
from pallas.feature_map import FeatureMap
from rattn_eqx.model import few_rows
from rattn_eqx.model.attention import GlobalAttention, RAttention
from rattn_eqx.model.cache import Piece
from rattn_eqx.model.config import LayerKind, ModelConfig
from rattn_eqx.model.feed_forward import FeedForward
from rattn_eqx.model.map_files import map_of
from rattn_eqx.model.norm import RMSNorm


@checked
class Block(eqx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): pre-norm, in x's dtype.

    `eqx.tree_at` puts another module in the attention's place: any that is called alike.
    """

    attention_norm: RMSNorm
    attention: RAttention | GlobalAttention
    feed_forward_norm: RMSNorm
    feed_forward: FeedForward

    def __init__(
        self,
        config: ModelConfig,
        kind: LayerKind,
        *,
        feature_map: FeatureMap | None = None,
        implementation: str | None = None,
        key: PRNGKeyArray,
    ):
        attention_key, feed_forward_key = jax.random.split(key)
        heads: dict[str, Any] = dict(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            qk_norm=config.qk_norm,
            qkv_bias=config.qkv_bias,
            norm_eps=config.norm_eps,
            rope_scaling=config.rope_scaling,
            implementation=implementation,
            key=attention_key,
        )
        self.attention_norm = RMSNorm(config.model_width, config.norm_eps)
        self.feed_forward_norm = RMSNorm(config.model_width, config.norm_eps)
        self.feed_forward = FeedForward(
            config.model_width, config.feed_forward_width, config.gate, key=feed_forward_key
        )
        if kind != "local":
            theta = config.rope_theta if kind == "global_rope" else None
            self.attention = GlobalAttention(config.model_width, rope_theta=theta, **heads)
            return
        if feature_map is None:
            map_key = jax.random.fold_in(key, 2)  # 0 and 1 give the keys split off
            feature_map = map_of(config.feature_map, config.head_size, key=map_key)
        self.attention = RAttention(
            config.model_width,
            window=config.window,
            residual=config.residual,
            feature_map=feature_map,
            learned_scale=config.learned_feature_scale,
            feature_projection=config.feature_projection,
            num_meta_tokens=config.num_meta_tokens,
            swa_gain=config.swa_gain,
            rla_gain=config.rla_gain,
            sinks=config.sinks,
            rope_theta=config.rope_theta,
            **heads,
        )

    @checked
    def __call__(
        self, x: Float[Array, "t {self.attention_norm.weight.shape[0]}"], segment_ids: Int[Array, "t"] | None = None
    ) -> Float[Array, "t {self.attention_norm.weight.shape[0]}"]:
        """The stream after this layer; segment_ids as in `RAttention`."""
        x = x + self.attention(self.attention_norm(x), segment_ids)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def extend(self, x: Float[Array, "t m"], cache: StepCache, piece: Piece) -> tuple[Float[Array, "t m"], StepCache]:
        """The stream of new tokens after this layer, and its cache after them."""
        gathered, cache = self.attention.extend(self.attention_norm(x), cache, piece)
        x = x + gathered
        return x + self.feed_forward(self.feed_forward_norm(x)), cache

    def step(self, x: Float[Array, "m"], cache: StepCache) -> tuple[Float[Array, "m"], StepCache]:
        """The stream of one more token after this layer, and its cache after it."""
        gathered, cache = self.attention.step(self.attention_norm(x), cache)
        x = x + gathered
        return x + few_rows.apply(FeedForward.__call__, self.feed_forward, self.feed_forward_norm(x)), cache
