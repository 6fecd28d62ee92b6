"""`rattn generate`."""

import argparse
import sys

from rattn_eqx.arguments import OF_MODEL, Help, finite, path, place, utf8, whole
from rattn_eqx.console import say


def add(commands: argparse._SubParsersAction) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "generate", help="continue a prompt with a trained run", formatter_class=Help,
        description="Write what a trained model thinks comes after the prompt.",
    )  # fmt: skip
    command.set_defaults(run=run)
    add = command.add_argument
    add("--run", dest="folder", type=path, required=True, help="run folder that `rattn pretrain` or `rattn "
        "import` left, or another path of a model")  # fmt: skip
    add("--feature-map", type=place, metavar="FILE.py:NAME", help=OF_MODEL)
    add("--prompt", type=utf8, action="append", help="text to continue; given again, several texts, each written as a "
        "line of JSON when it is whole")  # fmt: skip
    add("--prompts", type=path, metavar="FILE", help="a prompt on each line of a file, or of the standard input (-)")
    add("--chat", action="store_true", help="the prompt is a user's message, and the answer of a checkpoint that was "
        "trained to chat is written, without the prompt")  # fmt: skip
    add("--num-tokens", type=whole(), default=300, help="most tokens to write, for each prompt")
    add("--stop", type=utf8, action="append", help="end before this text; may be given again")
    add("--max-length", type=whole(), help="tokens that global layers have room for; default: a power of two that fits")
    add("--no-stream", action="store_true", help="write 64 tokens at a time, which is faster")
    add("--temperature", type=finite, default=0.8, help="0 takes the likeliest token each time")
    add("--top-k", type=whole(), help="draw from the k likeliest tokens only")
    add("--top-p", type=finite, help="draw from the fewest likeliest tokens that hold this probability")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="of the draws")


def run(options: argparse.Namespace) -> None:
    import json
    import time

    import jax

    from rattn_eqx.inference.generate import STEPS
    from rattn_eqx.inference.text import generate_texts
    from rattn_eqx.weights.load import load_with_tokenizer

    prompts = _prompts(options)
    said = [[{"role": "user", "content": prompt}] if options.chat else prompt for prompt in prompts]
    model, tokenizer = load_with_tokenizer(options.folder, feature_map=options.feature_map, report=say)
    keys = jax.random.key(options.seed)
    drawn = generate_texts(
        model,
        tokenizer,
        said,
        num_tokens=options.num_tokens,
        max_length=options.max_length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop or (),
        stream=not options.no_stream,
        key=keys[None] if len(prompts) == 1 else keys,
    )
    output, texts, many = sys.stdout.buffer, [""] * len(prompts), len(prompts) > 1 or options.prompts is not None
    if not many and not options.chat:
        output.write(prompts[0].encode("utf-8"))

    def write_line(row: int, ended: str) -> None:
        line = {"index": row, "prompt": prompts[row], "text": texts[row], "ended": ended}
        output.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")

    at_once = STEPS if options.no_stream else 1  # tokens of each text: the first of them come after compiling
    counts, started = [0] * len(prompts), None
    for row, piece, ended in drawn:
        started = started or time.monotonic()
        counts[row] += 1
        texts[row] += piece
        if not many:
            output.write(piece.encode("utf-8"))
        elif ended is not None:
            write_line(row, ended)
        output.flush()
    for row, count in enumerate(counts):
        if many and not count:  # --num-tokens 0
            write_line(row, "count")
    output.write(b"" if many else b"\n")
    output.flush()
    later = sum(max(0, count - at_once) for count in counts)
    seconds = time.monotonic() - (started or 0)
    speed = f"{later / max(seconds, 1e-9):,.0f} tokens/s after the first {at_once}; " if later else ""
    say(f"{sum(counts):,} tokens, {speed}caches of {_cache_in_words(model, tokenizer, said, options)}")


def _prompts(options: argparse.Namespace) -> list[str]:
    """Those given, then those of a file: one on each line."""
    from rattn_eqx.data import files

    prompts = list(options.prompt or [])
    if options.prompts is not None:
        source = "the standard input" if str(options.prompts) == "-" else options.prompts
        data = sys.stdin.buffer.read() if str(options.prompts) == "-" else files.read_bytes(options.prompts, 2**26)
        try:
            lines = data.decode("utf-8").replace("\r\n", "\n").split("\n")  # a form feed is part of a prompt
        except UnicodeDecodeError as error:
            raise ValueError(f"generate: prompts must be UTF-8 text; {source} is not: {error}") from error
        prompts += lines if lines[-1] else lines[:-1]
        if not prompts:
            raise ValueError(f"generate: {source} must have a prompt on each line; it is empty")
    return prompts or [""]


def _cache_in_words(model, tokenizer, prompts: list, options: argparse.Namespace) -> str:
    from rattn_eqx.inference.cost import cache_bytes
    from rattn_eqx.inference.generate import room
    from rattn_eqx.inference.text import prompt_tokens

    longest = max(len(prompt_tokens(tokenizer, prompt)) for prompt in prompts) + options.num_tokens
    each = cache_bytes(model.config, room(model, longest, options.max_length) or 1, dtype=model.compute_dtype)
    return f"{len(prompts)} x {each:,} bytes"
