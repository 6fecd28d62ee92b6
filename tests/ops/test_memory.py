"""`chunked` is linear in the sequence's length: in memory, and in time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import AS_USERS

LONG, SHORT = 65_536, 8_192
PROGRAM = """
import json, resource, statistics, sys, time
import jax
import jax.numpy as jnp
import pallas

def arrays(length):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (length, heads, 64)) for key, heads in zip(keys, (4, 1, 1)))
    gain = jnp.ones((4, 64))
    return {"q": q, "k": k, "v": v, "swa_gain": gain, "rla_gain": gain}

@jax.jit
@jax.grad
def forward_and_backward(x):
    output = pallas.rattention(**x, window=512, implementation="chunked")
    return jnp.sum(output * x["q"])

def seconds(x):
    started = time.perf_counter()
    jax.block_until_ready(forward_and_backward(x))
    return time.perf_counter() - started

long = arrays(int(sys.argv[2]))
seconds(long)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
short = arrays(int(sys.argv[1]))
seconds(short)
pairs = [(statistics.median(seconds(short) for _ in range(3)), seconds(long)) for _ in range(3)]  # side by side
short_seconds, long_seconds = (statistics.median(times) for times in zip(*pairs))
print(json.dumps({"peak": peak, "short": short_seconds, "long": long_seconds}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX resource usage")
def test_long_sequences_take_memory_and_time_in_proportion():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"} | AS_USERS
    command = [sys.executable, "-c", PROGRAM, str(SHORT), str(LONG)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    per_token = {"short": measured["short"] / SHORT, "long": measured["long"] / LONG}
    ratio = per_token["long"] / per_token["short"]
    print(
        f"peak resident memory {measured['peak'] / 1e9:.2f} GB; microseconds per token {1e6 * per_token['short']:.1f} "
        f"at {SHORT:,} tokens, {1e6 * per_token['long']:.1f} at {LONG:,}: {ratio:.2f} times"
    )
    assert measured["peak"] < 1.5e9
    assert ratio < 1.5
