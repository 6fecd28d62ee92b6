"""The study's text and arms, at a size of seconds."""

import json

import numpy as np
import pytest
from small_model import drawn
from test_conversion import OLD

from rattn_eqx.conversion.study import Arm, arm_of, main
from rattn_eqx.data.tokenizers import ByteTokenizer
from rattn_eqx.weights import own


def test_an_arm_is_what_its_name_says():
    assert arm_of("full") == Arm("full")
    assert arm_of("rattention-64-3:1") == Arm("rattention", 64, "3:1", True)
    assert arm_of("window-512-none-nosinks") == Arm("window", 512, "none", False)
    for name in ("window", "window-0-none", "rattention-64-2:1", "full-64", "window-64-none-sinks"):
        with pytest.raises(ValueError, match=f"^study: an arm is full, or .* got '{name}'"):
            arm_of(name)


@pytest.mark.standard_dtype_promotion  # optax
def test_arms_share_text_and_tokens_and_leave_a_line_each(tmp_path):
    own.save(drawn(OLD, size=0.4), tmp_path / "old", tokenizer=ByteTokenizer())
    for domain, words in (("code", "def f(x): return x\n"), ("prose", "Nobody had seen the boat since. ")):
        (tmp_path / domain).mkdir()
        for number in range(4):
            (tmp_path / domain / f"{number}.txt").write_text(f"{number} {words}" * 40)
    place = lambda name: f"{name}={tmp_path / name}"
    text = ["text", "--domain", place("code"), "--domain", place("prose"), "--limit", "1500"]
    text += ["--cache", str(tmp_path / "cache")]
    assert main([*text, "--model", str(tmp_path / "old"), "--out", str(tmp_path / "text")]) == 0
    manifest = json.loads((tmp_path / "text/manifest.json").read_text())["domains"]
    learned = np.load(tmp_path / "text/train.npy")
    assert len(learned) == sum(x["tokens"] for x in manifest.values())
    assert 1500 <= manifest["prose"]["tokens"] < len(learned) - 1500
    held_out = np.load(tmp_path / "text/prose.npy").astype(np.uint8).tobytes()
    assert held_out[1:200] not in learned.astype(np.uint8).tobytes(), "files are held out whole"

    arguments = ["run", "--model", str(tmp_path / "old"), "--text", str(tmp_path / "text"), "--steps", "4"]
    given = {"transfer-steps": 2, "batch-size": 2, "context": 64, "compute-dtype": "float32", "texts": 1, "needles": 2}
    arguments += [f"--{name}={value}" for name, value in given.items()]
    arguments += ["--lengths", "300", "--haystack", "code", "--save", str(tmp_path / "lines.jsonl")]
    for arm in ("full", "rattention-6-3:1"):
        assert main([*arguments, "--arm", arm, "--out", str(tmp_path / arm)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["full", "rattention-6-3:1"]
    for row, trained in zip(rows, (4, 2), strict=True):
        steps = (tmp_path / row["arm"] / "training/metrics.jsonl").read_text().splitlines()
        assert len([x for x in steps if "gradient_norm" in x]) == trained, "tokens of the transfer count"
        assert set(row["loss"]) == {"code", "prose"}
        assert row["loss"]["prose"]["by_position"][-1][:2] == [0, 64]
        assert set(row["needles"]["300"]) == {"word", "number", "id", "traced"}
        assert row["commit"]
    assert ("branch_off" in rows[1], "branch_off" in rows[0]) == (True, False)
    assert rows[1]["branch_off"]["code"]["second_half"] != rows[1]["loss"]["code"]["second_half"]
    with pytest.raises(ValueError, match="code has no held-out text of 9001 tokens"):
        main([*arguments, "--arm", "full", "--context", "9000", "--out", str(tmp_path / "long")])
    assert not (tmp_path / "long").exists(), "told before the work"
