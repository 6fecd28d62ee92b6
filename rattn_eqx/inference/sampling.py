"""Which tokens may follow, and one of them drawn."""

import sys

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pallas.checked import checked
from pallas.numerics import accumulation_dtype


@checked
def filter_logits(
    logits: Float[Array, "vocabulary"],
    *,
    temperature: float | int,
    top_k: int | None = None,
    top_p: float | int | None = None,
) -> Float[Array, "vocabulary"]:
    """(logits - their maximum) / temperature, with -inf for every token that top-k or top-p excludes.

    In float32 (float64 for float64 logits), whatever their dtype. Tied tokens are equally likely; where top-k or top-p
    cuts between them, those of lower id stay.

    Args:
      logits: -inf for tokens that are forbidden, which stay so; of the others at least one, and all finite.
      temperature: above 0; below 1 sharpens the distribution, above 1 flattens it. Below 1.2e-38, float32's smallest
        normal number, it counts as that.
      top_k: keep the k likeliest tokens; of equal ones, those of lower id. None keeps all.
      top_p: then keep the fewest likeliest tokens whose probabilities, renormalised after top_k, sum to at least p
        (nucleus sampling, Holtzman et al., arXiv 1904.09751). The likeliest token always stays. None keeps all.

    Raises:
      ValueError: if temperature is not finite or not above 0, top_k below 1, or top_p outside (0, 1].
    """
    check_sampling("filter_logits", temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError("filter_logits: temperature must be above 0; got 0; sample_token takes 0, the likeliest token")
    dtype = accumulation_dtype(logits)
    logits = logits.astype(dtype)
    smallest = float(jnp.finfo(dtype).tiny)
    divisor = min(max(temperature, smallest), 1 / smallest)
    logits = jnp.where(logits == -jnp.inf, -jnp.inf, (logits - logits.max()) / divisor)
    if top_k is None and top_p is None:
        return logits
    order = jnp.argsort(logits, descending=True)  # stable: equal logits stay in order of id
    ranked = logits[order]
    kept = jnp.ones(ranked.shape, bool)
    if top_k is not None:
        kept = jnp.arange(ranked.size) < min(top_k, ranked.size)
    if top_p is not None and top_p < 1:  # a rounded sum may reach 1 before the last token does
        probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf))
        kept = kept & (jnp.cumsum(probabilities) - probabilities < top_p).at[0].set(True)
    return jnp.where(jnp.zeros_like(kept).at[order].set(kept), logits, -jnp.inf)


@checked
def sample_token(
    logits: Float[Array, "vocabulary"],
    *,
    temperature: float | int,
    top_k: int | None = None,
    top_p: float | int | None = None,
    key: PRNGKeyArray,
) -> Int[Array, ""]:
    """Draw one token from the distribution that `filter_logits` leaves; at temperature 0 take the likeliest.

    Of tokens that tie for the likeliest, temperature 0 takes the lowest id; above 0 each is drawn as often as another.

    Returns:
      The token's id; -1, which is no token, where a logit is NaN or +inf, or all are -inf.

    Raises:
      ValueError: if temperature is below 0 or not finite, top_k below 1, or top_p outside (0, 1].
    """
    check_sampling("sample_token", temperature, top_k, top_p)
    if temperature == 0:
        token = jnp.argmax(logits)
    else:
        token = jax.random.categorical(key, filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p))
    return jnp.where(jnp.isfinite(logits.max()), token, -1)


def check_sampling(function: str, temperature: float | int, top_k: int | None, top_p: float | int | None) -> None:
    if not temperature >= 0:
        raise ValueError(f"{function}: temperature must be at least 0; got {temperature}; 0 takes the likeliest token")
    if temperature > sys.float_info.max:
        raise ValueError(f"{function}: temperature must be finite; got more than 1.79e308; 1e4 draws evenly")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{function}: top_k must be at least 1; got {top_k}; None keeps every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{function}: top_p must lie in (0, 1]; got {top_p}; None keeps every token")
