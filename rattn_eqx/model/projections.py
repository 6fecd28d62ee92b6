"""From the stream to the heads of an attention layer, and back."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pallas import StepCache
from pallas.checked import checked
from rattn_eqx.model.initialise import truncated_normal
from rattn_eqx.model.norm import RMSNorm


@checked
class Projections(eqx.Module):
    """Queries, keys and values of a sequence, and the way back from heads to the model width.

    `qkv_bias` adds biases, which begin at 0, to the first three.

    Raises:
      ValueError: if num_heads is not a multiple of num_kv_heads.
    """

    query_weight: Float[Array, "m h d"]
    key_weight: Float[Array, "m kv d"]
    value_weight: Float[Array, "m kv d"]
    out_weight: Float[Array, "h d m"]
    query_bias: Float[Array, "h d"] | None
    key_bias: Float[Array, "kv d"] | None
    value_bias: Float[Array, "kv d"] | None
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None

    def __init__(
        self,
        model_width: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        qk_norm: bool,
        *,
        qkv_bias: bool = False,
        norm_eps: float | int = 1e-6,
        key: PRNGKeyArray,
    ):
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"attention: num_heads must be a multiple of num_kv_heads; got {num_heads} and {num_kv_heads}"
            )
        keys = jax.random.split(key, 4)
        self.query_weight = truncated_normal(keys[0], (model_width, num_heads, head_size), model_width)
        self.key_weight = truncated_normal(keys[1], (model_width, num_kv_heads, head_size), model_width)
        self.value_weight = truncated_normal(keys[2], (model_width, num_kv_heads, head_size), model_width)
        self.out_weight = truncated_normal(keys[3], (num_heads, head_size, model_width), num_heads * head_size)
        bias = lambda heads: jnp.zeros((heads, head_size), jnp.float32) if qkv_bias else None
        self.query_bias, self.key_bias, self.value_bias = bias(num_heads), bias(num_kv_heads), bias(num_kv_heads)
        self.query_norm = RMSNorm(head_size, norm_eps) if qk_norm else None
        self.key_norm = RMSNorm(head_size, norm_eps) if qk_norm else None

    @property
    def model_width(self) -> int:
        return self.query_weight.shape[0]

    @checked
    def project(
        self, x: Float[Array, "t {self.model_width}"]
    ) -> tuple[Float[Array, "t h d"], Float[Array, "t kv d"], Float[Array, "t kv d"]]:
        """Queries, keys and values, in x's dtype, without norm or position."""
        weights = (self.query_weight, self.key_weight, self.value_weight)
        q, k, v = (jnp.einsum("tm,mhd->thd", x, w.astype(x.dtype)) for w in weights)
        if self.query_bias is not None and self.key_bias is not None and self.value_bias is not None:
            q, k, v = (
                y + bias.astype(x.dtype)[None]
                for y, bias in ((q, self.query_bias), (k, self.key_bias), (v, self.value_bias))
            )
        return q, k, v

    @checked
    def norm(
        self, q: Float[Array, "t h {self.query_weight.shape[2]}"], k: Float[Array, "t kv {self.key_weight.shape[2]}"]
    ) -> tuple[Float[Array, "t h d"], Float[Array, "t kv d"]]:
        """An RMS norm of each head of q and k (qk-norm); nothing without it."""
        if self.query_norm is None or self.key_norm is None:
            return q, k
        return self.query_norm(q), self.key_norm(k)

    def init_cache(self, slots: int, dtype: Any) -> StepCache:
        """A ring of so many slots that holds no token, without a state."""
        ring = lambda weight: jnp.zeros((slots, *weight.shape[1:]), dtype)
        return StepCache(ring(self.key_weight), None, ring(self.value_weight), None, jnp.array(0, jnp.int32))

    @checked
    def merge(
        self, heads: Float[Array, "t {self.out_weight.shape[0]} {self.out_weight.shape[1]}"]
    ) -> Float[Array, "t {self.model_width}"]:
        """The sum over heads of each head's output projection."""
        return jnp.einsum("thd,hdm->tm", heads, self.out_weight.astype(heads.dtype))
