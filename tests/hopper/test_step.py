"""One token by the Hopper kernels, interpreted where there is no GPU, held to the float64 reference."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import FLOOR, quick
from test_hopper_planted import plant  # noqa: F401 (a fixture)

import pallas
from pallas import StepCache, feature_map, rattention_step, sliding_window_attention_step
from pallas.hopper import step
from pallas.numerics import relative_rms
from pallas.ops import choose
from pallas.tools.cases import precision

pytest.importorskip("jax", "0.11", reason="the kernels need jax 0.11 (Python 3.12)")


pytestmark = pytest.mark.kernel


@dataclasses.dataclass(frozen=True)
class Steps:
    """So many tokens, one after the other, of a batch; slots that hold no token are NaN."""

    window: int
    lengths: tuple[int, ...]
    sizes: tuple[int, int, int, int] = (2, 1, 64, 64)  # h, kv, d, dv
    map: Any = feature_map.softmax
    own_key: bool = True  # does the residual branch read another key than the window?
    residual: bool = True
    tokens: int = 2
    sinks: bool = False
    swa_norm: bool = True

    def arrays(self):
        """(the caches, tokens, gains and sinks) of a batch, in NumPy; bfloat16 but for state, length and the last."""
        r, (h, kv, d, dv), b = np.random.default_rng(0), self.sizes, len(self.lengths)
        narrow = lambda *shape: r.standard_normal(shape).astype(jnp.bfloat16)
        held = np.arange(self.window) < np.array(self.lengths)[:, None]
        ring = lambda size: np.where(held[:, :, None, None], narrow(b, self.window, kv, size), np.nan).astype(
            jnp.bfloat16
        )
        f = feature_map.num_features(self.map, d)
        state = r.standard_normal((b, kv, f, dv)).astype(np.float32) if self.residual else None
        keys_rla = ring(d) if self.own_key and self.residual else None
        cache = dict(keys=ring(d), keys_rla=keys_rla, values=ring(dv), state=state)
        rows = dict(q=(h, d), k=(kv, d), v=(kv, dv))
        if self.residual:
            rows |= dict(q_rla=(h, d)) | (dict(k_rla=(kv, d)) if self.own_key else {})
        tokens = [{name: narrow(b, *shape) for name, shape in rows.items()} for _ in range(self.tokens)]
        of_layer = {name: r.standard_normal((h, dv)).astype(np.float32) for name in ("swa_gain", "rla_gain")}
        of_layer = of_layer if self.residual else {}
        if self.sinks:
            of_layer["sink_logits"] = r.standard_normal(h).astype(np.float32)
        return cache | dict(length=np.array(self.lengths, np.int32)), tokens, of_layer

    def run(self, implementation: str, dtype: str):
        """(outputs [tokens, b, h, dv], the caches after them)"""
        wide = lambda x: x.astype(np.float64) if dtype == "float64" and x.dtype != np.int32 else x
        cache, tokens, of_layer = jax.tree.map(wide, self.arrays())

        def one(token, cache):
            if not self.residual:
                return sliding_window_attention_step(**token, cache=cache, **of_layer, implementation=implementation)
            settings = dict(feature_map=self.map, implementation=implementation)
            settings |= of_layer if self.swa_norm else of_layer | {"swa_gain": None}
            return rattention_step(**token, cache=cache, **settings)

        with precision(dtype, None):
            cache, tokens, of_layer = jax.tree.map(jnp.asarray, (cache, tokens, of_layer))
            caches, outputs = jax.vmap(lambda cache: StepCache(**cache))(cache), []
            batch = jax.jit(jax.vmap(one))
            for token in tokens:
                out, caches = batch(token, caches)
                outputs.append(np.asarray(out, np.float64))
            return np.stack(outputs), jax.tree.map(np.asarray, caches)

    def failures(self) -> list[str]:
        """What is outside the bounds of tests/conformance.py."""
        expected, right = self.run("reference", "float64")
        of_chunked, _ = self.run("chunked", "bfloat16")
        got, cache = self.run("gpu", "bfloat16")
        found = []
        for token, sequence in np.ndindex(got.shape[:2]):
            x, y, z = (outputs[token, sequence] for outputs in (expected, of_chunked, got))
            error, bound = relative_rms(z, x), 2 * relative_rms(y, x) + FLOOR["bfloat16"]
            found += [] if error <= bound else [f"token {token} of sequence {sequence}: {error:.1e} > {bound:.1e}"]
        if self.residual and not relative_rms(cache.state, right.state) < 1e-5:
            found.append(f"state: {relative_rms(cache.state, right.state):.1e}")
        for name in ("keys", "keys_rla", "values", "length"):
            x, y = (getattr(c, name) for c in (right, cache))
            if x is not None and not np.array_equal(x, y.astype(x.dtype), equal_nan=True):
                found.append(name)
        return found


CASES = [
    Steps(130, (131, 129, 0, 70), sizes=(3, 1, 64, 64)),
    Steps(130, (131, 129, 0, 70), sizes=(3, 1, 64, 64), sinks=True, swa_norm=False),
    Steps(64, (64, 63, 200), sizes=(4, 1, 128, 128)),
    Steps(0, (0, 5), sizes=(2, 1, 64, 64), tokens=1),
    Steps(1, (0, 1), sizes=(1, 1, 64, 48), own_key=False),
    Steps(63, (62, 63), sizes=(4, 2, 40, 56)),
    Steps(70, (71, 69), sizes=(17, 1, 64, 64), tokens=1),
    Steps(72, (300, 71), map=feature_map.elu_plus_one),
    Steps(64, (64, 5), sizes=(2, 1, 16, 16), map=feature_map.taylor),
    Steps(300, (301, 70, 0), sizes=(3, 1, 64, 64), residual=False),  # in two parts
    Steps(64, (64, 3), sizes=(2, 2, 128, 128), residual=False),
]


@pytest.mark.parametrize("case", [CASES[0], *quick(*CASES[1:])], ids=str)
def test_conforms(case):
    assert case.failures() == []


def test_a_long_ring_is_cut_only_where_the_batch_is_small(monkeypatch):
    monkeypatch.setattr(step, "BLOCKS", 1)
    assert Steps(300, (301, 70), residual=False, tokens=1).failures() == []


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("step_window", "(place != leaving)", "(place != leaving + 1)"),
        ("step_window", "first + chunk > held", "first > held"),
        ("step", "lax.rem(length,", "lax.rem(length + 1,"),
        ("step", "length >= plan.window", "length > plan.window"),
        ("step_window", "per_column(n, 1.0)", "per_column(n, 0.0)"),
    ],
)  # fmt: skip
def test_a_planted_bug_is_seen(plant, name, right, wrong):  # noqa: F811
    plant(name, (right, wrong))
    assert Steps(72, (72, 30), tokens=1, sinks=True, swa_norm=False).failures() != []


def test_what_the_kernels_refuse():
    x, ring = jnp.ones((2, 64), jnp.bfloat16), jnp.ones((8, 2, 64), jnp.bfloat16)
    op = "rattention_step"
    assert choose(op, "gpu", x, x, x, x, x, ring, ring) == "gpu"
    with pytest.raises(NotImplementedError, match="bfloat16 alone; got bfloat16, float32"):
        choose(op, "gpu", x, x, x, x, x, ring.astype(jnp.float32), ring)
    with pytest.raises(NotImplementedError, match="up to 64 query heads for each key/value head; got 65"):
        choose(op, "gpu", jnp.ones((65, 64), jnp.bfloat16), x[:1], x[:1], x, x)
    wide = jnp.ones((2, 136), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="head sizes up to 128"):
        pallas.sliding_window_attention_step(
            wide, wide, wide, StepCache(jnp.ones((8, 2, 136), jnp.bfloat16), None, jnp.ones((8, 2, 136), jnp.bfloat16),
            None, jnp.array(0)), implementation="gpu",
        )  # fmt: skip
