"""The two attention layers of a local-global model. Unbatched: `jax.vmap` batches."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

import pallas
from pallas import StepCache
from pallas.checked import checked
from pallas.checks import check_feature_map
from pallas.feature_map import FeatureMap, as_pair, num_features
from pallas.numerics import accumulation_dtype
from rattn_eqx.model import few_rows
from rattn_eqx.model.cache import Piece, join, keep
from rattn_eqx.model.projections import Projections
from rattn_eqx.model.rotary import RopeScaling, rotary


@checked
class MetaTokens(eqx.Module):
    """Learned keys and values whose sum of phi(k)^T v is the state that every document starts from."""

    keys: Float[Array, "tokens kv d"]
    values: Float[Array, "tokens kv dv"]

    def __init__(self, num_tokens: int, num_kv_heads: int, head_size: int, *, key: PRNGKeyArray):
        keys, shape = jax.random.split(key), (num_tokens, num_kv_heads, head_size)
        self.keys = jax.random.normal(keys[0], shape, jnp.float32)
        self.values = jax.random.normal(keys[1], shape, jnp.float32) / num_tokens**0.5

    @checked
    def state(self, phi_k: Callable) -> Float[Array, "kv f dv"]:
        """sum over tokens of phi_k(key)^T value."""
        return jnp.einsum("nkf,nkv->kfv", phi_k(self.keys).astype(self.values.dtype), self.values)


@checked
class FeatureScale(eqx.Module):
    """A learned scale of each channel of the residual branch's q and k; starts at 1."""

    query: Float[Array, "h d"]
    key: Float[Array, "kv d"]

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int):
        self.query = jnp.ones((num_heads, head_size), jnp.float32)
        self.key = jnp.ones((num_kv_heads, head_size), jnp.float32)


@checked
class FeatureProjection(eqx.Module):
    """A learned matrix for each head of the residual branch's q and k; starts as the identity.

    The map that follows may be one of the kernels' own.
    """

    query: Float[Array, "h d d"]
    key: Float[Array, "kv d d"]

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int):
        identity = jnp.eye(head_size, dtype=jnp.float32)
        self.query = jnp.broadcast_to(identity, (num_heads, head_size, head_size))
        self.key = jnp.broadcast_to(identity, (num_kv_heads, head_size, head_size))


@checked
class RAttention(eqx.Module):
    """A local layer: sliding-window attention plus residual linear attention over what the window left behind.

    o = swa_gain rms(o_swa) + rla_gain rms(o_rla), then the output projection (arXiv 2506.15545, section 3). Queries and
    keys get qk-norm and rotary embedding for the window and neither for the residual branch.

    `residual=False` is plain sliding-window attention: no residual branch, norms or gains. `window=0` is linear
    attention alone. A window of the sequence's length or more is full attention.

    Args of the constructor:
      model_width, num_heads, num_kv_heads, head_size: sizes m, h, kv and d; values have d channels too.
      window: keys that a query sees, itself included.
      feature_map: any callable (..., d) -> (..., f), or a pair of them for q and k; an Equinox module in its place is
        trained with the rest.
      learned_scale: a learned scale of each channel of the residual branch's q and k.
      feature_projection: a learned matrix for each head of them, before the scale.
      num_meta_tokens: learned key/value pairs whose state every document starts from; 0 for none.
      swa_gain, rla_gain: what the learned gains begin at. A small rla_gain lets the window's branch learn first. With
        swa_gain None the window's branch has neither norm nor gain: o = o_swa + rla_gain rms(o_rla), which with an
        rla_gain of 0 is the window alone, as a pretrained model knows it.
      sinks: a learned logit for each query head, without a value, in the window's softmax; it begins at 0. A norm
        undoes what it does: give it with swa_gain=None, or residual=False.
      qk_norm: norm the window's q and k over each head's channels.
      rope_theta: base of the rotary embedding's wavelengths.
      rope_scaling: of its frequencies.
      qkv_bias: biases of queries, keys and values, for both branches.
      norm_eps: of qk-norm.
      implementation: passed to the op.

    Raises:
      ValueError: for a negative window, num_heads that is no multiple of num_kv_heads, a feature map of another form,
        or options that do not fit together. Of a call: an odd head_size; what `pallas.rattention` raises.
    """

    projections: Projections
    swa_gain: Float[Array, "h dv"] | None
    rla_gain: Float[Array, "h dv"] | None
    sink_logits: Float[Array, "h"] | None
    feature_scale: FeatureScale | None
    feature_projection: FeatureProjection | None
    meta_tokens: MetaTokens | None
    feature_map: FeatureMap
    window: int = eqx.field(static=True)
    rope_theta: float | int = eqx.field(static=True)
    rope_scaling: RopeScaling | None = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        model_width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        window: int,
        residual: bool = True,
        feature_map: FeatureMap = pallas.feature_map.softmax,
        learned_scale: bool = False,
        feature_projection: bool = False,
        num_meta_tokens: int = 0,
        swa_gain: float | int | None = 1.0,
        rla_gain: float | int = 1.0,
        sinks: bool = False,
        qk_norm: bool = True,
        rope_theta: float | int = 5e5,
        rope_scaling: RopeScaling | None = None,
        qkv_bias: bool = False,
        norm_eps: float | int = 1e-6,
        implementation: str | None = None,
        key: PRNGKeyArray,
    ):
        if window < 0 or (window == 0 and not residual):
            raise ValueError(
                "RAttention: window must be at least 0, and at least 1 without the residual branch; "
                f"got window={window}, residual={residual}"
            )
        if not residual and (learned_scale or feature_projection or num_meta_tokens):
            raise ValueError(
                "RAttention: learned_scale, feature_projection and num_meta_tokens belong to the residual branch; got "
                f"residual=False, learned_scale={learned_scale}, feature_projection={feature_projection}, "
                f"num_meta_tokens={num_meta_tokens}"
            )
        if sinks and window == 0:
            raise ValueError("RAttention: sinks belong to the window; got window=0, sinks=True")
        if residual:
            check_feature_map("RAttention", feature_map, head_size)
        projections_key, meta_key = jax.random.split(key)
        heads = (num_heads, num_kv_heads, head_size)
        options: dict[str, Any] = dict(qkv_bias=qkv_bias, norm_eps=norm_eps)
        self.projections = Projections(model_width, *heads, qk_norm, **options, key=projections_key)
        gains = (num_heads, head_size)
        self.swa_gain = jnp.full(gains, swa_gain, jnp.float32) if residual and swa_gain is not None else None
        self.rla_gain = jnp.full(gains, rla_gain, jnp.float32) if residual else None
        self.sink_logits = jnp.zeros((num_heads,), jnp.float32) if sinks else None
        self.feature_scale = FeatureScale(*heads) if learned_scale else None
        self.feature_projection = FeatureProjection(*heads) if feature_projection else None
        self.meta_tokens = (
            MetaTokens(num_meta_tokens, num_kv_heads, head_size, key=meta_key) if num_meta_tokens else None
        )
        self.feature_map = feature_map
        self.window = window
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.implementation = implementation

    @checked
    def __call__(
        self, x: Float[Array, "t {self.projections.model_width}"], segment_ids: Int[Array, "t"] | None = None
    ) -> Float[Array, "t {self.projections.model_width}"]:
        """What each token gathers, in x's dtype.

        Args:
          x: normed stream of one sequence.
          segment_ids: one id for each token; a token reads its own run of equal ids only.
        """
        return self.projections.merge(self.attend(*self.inputs(x), segment_ids))

    def inputs(self, x: Array, positions: Array | None = None) -> tuple[Array, Array, Array, Array, Array]:
        """(q, k) of the window, with qk-norm and rotary embedding; (q, k) of the residual branch; and v, of heads.

        positions: 0, 1, 2, ... by default.
        """
        q, k, v = self.projections.project(x)
        return self.of_heads(q, k, v, positions)

    def of_heads(
        self, q: Array, k: Array, v: Array, positions: Array | None = None
    ) -> tuple[Array, Array, Array, Array, Array]:
        """`inputs` of what `project` gives."""
        return *self.rotate(*self.projections.norm(q, k), positions), *self.scale(q, k), v

    def rotate(self, q: Array, k: Array, positions: Array | None = None) -> tuple[Array, Array]:
        """q and k with the rotary embedding of their positions."""
        positions = jnp.arange(q.shape[0]) if positions is None else positions
        options: dict[str, Any] = dict(theta=self.rope_theta, scaling=self.rope_scaling)
        return rotary(q, positions, **options), rotary(k, positions, **options)

    def scale(self, q: Array, k: Array) -> tuple[Array, Array]:
        """q and k with the residual branch's learned matrices and scale of each channel, if there are any."""
        if self.feature_projection is not None:
            project = lambda x, matrix: jnp.einsum("thd,hde->the", x, matrix.astype(x.dtype))
            q, k = project(q, self.feature_projection.query), project(k, self.feature_projection.key)
        if self.feature_scale is None:
            return q, k
        scale = self.feature_scale
        return q * scale.query.astype(q.dtype)[None], k * scale.key.astype(k.dtype)[None]

    def initial_state(self) -> Array | None:
        """What every document starts from, [kv, f, dv]; None is zero."""
        return None if self.meta_tokens is None else self.meta_tokens.state(as_pair(self.feature_map)[1])

    def attend(
        self, q_swa: Array, k_swa: Array, q_rla: Array, k_rla: Array, v: Array, segment_ids: Array | None
    ) -> Array:
        """The heads: `pallas.rattention` of what `inputs` gives, or without the residual branch the window's alone."""
        options: dict[str, Any] = dict(window=self.window, segment_ids=segment_ids, implementation=self.implementation)
        options["sink_logits"] = self.sink_logits
        if self.rla_gain is None:
            return pallas.sliding_window_attention(q_swa, k_swa, v, **options)
        state = self.initial_state()
        heads: Any = pallas.rattention(  # one array: no final state is asked for
            q_swa,
            k_swa,
            v,
            q_rla=q_rla,
            k_rla=k_rla,
            **self.of_residual,
            initial_state=state,
            segment_state=state,
            **options,
        )
        return heads

    @property
    def of_residual(self) -> dict[str, Any]:
        """What `pallas.rattention` and `rattention_step` are told of the residual branch."""
        return dict(swa_gain=self.swa_gain, rla_gain=self.rla_gain, feature_map=self.feature_map)

    def init_cache(self, room: int | None, dtype: Any) -> StepCache:
        """A document's, before its first token; room: of the longest, None if nothing limits it."""
        slots = self.window if room is None else min(self.window, room)
        cache = self.projections.init_cache(slots, dtype)
        if self.rla_gain is None:
            return cache
        (_, kv, d), (_, dv) = cache.keys.shape, self.rla_gain.shape
        shape = (kv, num_features(self.feature_map, d), dv)
        keys, state = jnp.zeros_like(cache.keys), jnp.zeros(shape, accumulation_dtype(cache.keys))
        return self.begun(StepCache(cache.keys, keys, cache.values, state, cache.length))

    def begun(self, cache: StepCache) -> StepCache:
        """The cache as at the head of a document."""
        return cache.begun(None if self.rla_gain is None else self.initial_state())

    def extend(self, x: Float[Array, "t m"], cache: StepCache, piece: Piece) -> tuple[Float[Array, "t m"], StepCache]:
        """What each token of a piece gathers, also of what the cache holds, and the cache after them."""
        q_swa, k_swa, q_rla, k_rla, v = self.inputs(x, piece.positions(cache.length))
        joined = join(cache, piece, k_swa, k_rla, v)
        shared: dict[str, Any] = dict(window=cache.window, segment_ids=joined.segment_ids)
        shared |= dict(sink_logits=self.sink_logits, implementation=self.implementation)
        q_swa, state = piece.to_end(q_swa), None
        if self.rla_gain is None:
            heads = pallas.sliding_window_attention(q_swa, joined.keys, joined.values, **shared)
        else:
            heads, state = pallas.rattention(
                q_swa,
                joined.keys,
                joined.values,
                q_rla=piece.to_end(q_rla),
                k_rla=joined.keys_rla,
                **self.of_residual,
                initial_state=cache.state,
                segment_state=self.initial_state(),
                return_final_state=True,
                **shared,
            )
        return self.projections.merge(piece.from_end(heads)), keep(cache, piece, joined, state)

    def step(self, x: Float[Array, "m"], cache: StepCache) -> tuple[Float[Array, "m"], StepCache]:
        """What one token gathers, and the cache after it."""
        q, k, v = (y[None] for y in few_rows.apply(Projections.project, self.projections, x))
        q_swa, k_swa, q_rla, k_rla, v = (y[0] for y in self.of_heads(q, k, v, cache.length[None]))
        options: dict[str, Any] = dict(sink_logits=self.sink_logits, implementation=self.implementation)
        step = pallas.sliding_window_attention_step
        if self.rla_gain is not None:
            step = functools.partial(pallas.rattention_step, q_rla=q_rla, k_rla=k_rla, **self.of_residual)
        heads, cache = step(q_swa, k_swa, v, cache, **options)
        return few_rows.apply(Projections.merge, self.projections, heads), cache


def cudnn_serves(q: Float[Array, "t h d"], v: Float[Array, "t kv dv"], piece: Piece) -> bool:
    """Can cuDNN compute full attention within a piece? On a GPU, in 16 bits, of one document."""
    narrow = q.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[-1] == v.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    return jax.default_backend() == "gpu" and piece.one_document and narrow and fits


@checked
class GlobalAttention(eqx.Module):
    """A global layer: full causal attention, without positions (NoPE, arXiv 2305.19466) or with rotary ones.

    Args of the constructor: as of `RAttention`; rope_theta None is without positions.
    """

    projections: Projections
    rope_theta: float | int | None = eqx.field(static=True)
    rope_scaling: RopeScaling | None = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        model_width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        qk_norm: bool = True,
        rope_theta: float | int | None = None,
        rope_scaling: RopeScaling | None = None,
        qkv_bias: bool = False,
        norm_eps: float | int = 1e-6,
        implementation: str | None = None,
        key: PRNGKeyArray,
    ):
        heads = (num_heads, num_kv_heads, head_size)
        options: dict[str, Any] = dict(qkv_bias=qkv_bias, norm_eps=norm_eps)
        self.projections = Projections(model_width, *heads, qk_norm, **options, key=key)
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.implementation = implementation

    @checked
    def __call__(
        self, x: Float[Array, "t {self.projections.model_width}"], segment_ids: Int[Array, "t"] | None = None
    ) -> Float[Array, "t {self.projections.model_width}"]:
        """What each token gathers, in x's dtype.

        Args:
          x: normed stream of one sequence.
          segment_ids: one id for each token; a token reads its own run of equal ids only.
        """
        q, k, v = self.inputs(x)
        heads = pallas.sliding_window_attention(
            q, k, v, window=x.shape[0], segment_ids=segment_ids, implementation=self.implementation
        )
        return self.projections.merge(heads)

    def inputs(self, x: Array, positions: Array | None = None) -> tuple[Array, Array, Array]:
        """Queries and keys, with qk-norm and rotary embedding if the layer has them, and values.

        positions: 0, 1, 2, ... by default.
        """
        q, k, v = self.projections.project(x)
        return *self.rotate(*self.projections.norm(q, k), positions), v

    def rotate(self, q: Array, k: Array, positions: Array | None = None) -> tuple[Array, Array]:
        """As of `RAttention`; nothing without positions."""
        if self.rope_theta is None:
            return q, k
        positions = jnp.arange(q.shape[0]) if positions is None else positions
        options: dict[str, Any] = dict(theta=self.rope_theta, scaling=self.rope_scaling)
        return rotary(q, positions, **options), rotary(k, positions, **options)

    def init_cache(self, room: int | None, dtype: Any) -> StepCache:
        """A document's, before its first token: room for all of it."""
        if room is None:
            raise ValueError(
                "init_cache: max_length must be given for a model with global layers, which keep every token; got None"
            )
        return self.projections.init_cache(room, dtype)

    def begun(self, cache: StepCache) -> StepCache:
        """As of `RAttention`."""
        return cache.begun(None)

    def extend(self, x: Float[Array, "t m"], cache: StepCache, piece: Piece) -> tuple[Float[Array, "t m"], StepCache]:
        """As of `RAttention`."""
        q, k, v = self.inputs(x, piece.positions(cache.length))
        joined = join(cache, piece, k, None, v)

        def after_cache():
            return piece.from_end(
                pallas.sliding_window_attention(
                    piece.to_end(q),
                    joined.keys,
                    joined.values,
                    window=joined.keys.shape[0],
                    segment_ids=joined.segment_ids,
                    implementation=self.implementation,
                )
            )

        def alone():
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

        known = self.implementation is None and cudnn_serves(q, v, piece)
        heads = jax.lax.cond(cache.length == 0, alone, after_cache) if known else after_cache()
        return self.projections.merge(heads), keep(cache, piece, joined, None)

    def step(self, x: Float[Array, "m"], cache: StepCache) -> tuple[Float[Array, "m"], StepCache]:
        """As of `RAttention`."""
        q, k, v = few_rows.apply(Projections.project, self.projections, x)
        q, k = (y[0] for y in self.rotate(*self.projections.norm(q[None], k[None]), cache.length[None]))
        heads, cache = pallas.sliding_window_attention_step(q, k, v, cache, implementation=self.implementation)
        return few_rows.apply(Projections.merge, self.projections, heads), cache
