"""Text of packages and documents: web pages without tags, .gz unpacked, sentences out of JSON, held out by file."""

import gzip
import json
from pathlib import Path

import pytest

from rattn_eqx.data.corpus import build_corpus
from rattn_eqx.data.packages import the_file
from rattn_eqx.data.prose import json_sentences, page_text

PAGE = """<!DOCTYPE html><html><head><title>unseen</title><style>p { color: red }</style></head><body>
<h1>Tides &amp; winds</h1><nav><a href="x">next</a></nav>
<p>A <b>spring</b>
 tide<sup>1</sup> is <i>high</i>.</p><ul><li>one<li>two <code>x&lt;y</code></ul>
<pre>def f(x):
    return x  # kept</pre><script>if (a < b) { alert() }</script>end<br>line</body></html>"""
SENTENCE = "one two three four five six seven eight"


def test_the_words_of_a_web_page():
    code = "def f(x):\n    return x  # kept"
    assert page_text(PAGE) == f"Tides & winds\n\nA spring tide1 is high.\n\none\ntwo x<y\n\n{code}\nend\nline\n"
    assert page_text("<html><body><img src=x></body></html>") == ""
    assert page_text("plain < text > &nosuch;") == "plain < text > &nosuch;\n"


def test_the_sentences_of_json():
    value = {"a": f"<p>{SENTENCE} <b>nine</b></p>", "b": [SENTENCE, {"c": SENTENCE, "d": "too short"}, 8], "e": None}
    assert json_sentences(json.dumps(value)) == f"{SENTENCE} nine\n\n{SENTENCE}\n"
    for other in ("", "{", "[" * 100_000, "3"):
        assert json_sentences(other) == ""


def test_documents_of_a_folder(tmp_path):
    """As under /usr/share/doc: packed ones too, damaged ones counted."""
    folder = tmp_path / "doc"
    folder.mkdir()
    (folder / "a.html").write_text(PAGE)
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (folder / "c.html.gz").write_bytes(gzip.compress(b"<p>packed page"))
    (folder / "d.json").write_text(json.dumps([SENTENCE]))
    (folder / "e.gz").write_bytes(gzip.compress(b"cut off" * 99)[:-9])
    (folder / "f.gz").write_bytes(b"no gzip")
    (folder / "g.tar.gz").write_bytes(gzip.compress(b"a\0b"))
    (folder / "h.html").write_bytes(b"<p>caf\xe9")
    corpus = build_corpus(folder, tmp_path / "cache")
    documents = corpus.documents("train") + corpus.documents("validation")
    assert sorted(documents) == sorted(
        [page_text(PAGE).encode(), b"packed text", b"packed page\n", json.dumps([SENTENCE]).encode()]
    )
    assert corpus.manifest["dropped"] == {"NUL bytes": 1, "not UTF-8": 1, "unreadable": 2}


def test_a_packed_file_is_no_larger_than_the_memory(tmp_path, monkeypatch):
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * 2**22))
    monkeypatch.setattr("rattn_eqx.data.corpus._free_memory", lambda: 2**20)
    monkeypatch.setattr("rattn_eqx.data.corpus._BLOCK", 2**16)
    with pytest.raises(ValueError, match=r"the text must fit in half of the free memory; got .*bomb.txt.gz of 589,824"):
        build_corpus(tmp_path / "bomb.txt.gz", tmp_path / "cache")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An installed package, as pip leaves it."""
    site = tmp_path / "site"
    contents = {
        "tides/__init__.py": "import nothing_that_exists",
        "tides/data/a.json.gz": json.dumps({"documentation": SENTENCE}),
        "tides/data/b.json": json.dumps({"short": "no sentence"}),
        "tides/guide.rst": "A guide.",
        "tides/logo.svg": "<svg/>",
        "tides/model.gguf": "GGUF",
        "tides-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tides\nVersion: 1.0\n",
        "tides-1.0.dist-info/licenses/LICENSE.txt": "A licence.",
        "../bin/tides.txt": "Not beside the package.",
    }
    for name, text in contents.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    record = [*contents, "tides/gone.rst"]
    (site / "tides-1.0.dist-info" / "RECORD").write_text("".join(f"{name},,\n" for name in record))
    monkeypatch.syspath_prepend(str(site))
    return site


def test_text_of_a_package(package, tmp_path):
    """It is not imported, and what pip knows of it is no text."""
    corpus = build_corpus("package:tides", tmp_path / "cache")
    documents = corpus.documents("train") + corpus.documents("validation")
    assert sorted(documents) == [b"A guide.", b"import nothing_that_exists", f"{SENTENCE}\n".encode()]
    assert corpus.manifest["dropped"] == {"empty": 1}
    assert corpus.manifest["path"] == "package:tides"
    part = build_corpus("package:tides/data/", tmp_path / "cache")
    assert b"".join(part.documents("train") + part.documents("validation")) == f"{SENTENCE}\n".encode()
    for source, reason in {
        "package:no-such-package": "build_corpus: no package 'no-such-package' is installed; pip install it, or give",
        "package:": "build_corpus: no package '' is installed",
        "package:tides/nowhere": "build_corpus: no text files under package:tides/nowhere",
    }.items():
        with pytest.raises(ValueError, match=reason):
            build_corpus(source, tmp_path / "cache")


def test_the_file_of_a_package(package, tmp_path):
    assert the_file("load", "package:tides", ".gguf") == package / "tides" / "model.gguf"
    assert the_file("load", tmp_path, ".gguf") == tmp_path
    with pytest.raises(ValueError, match=r"load: the package tides must have one \.onnx file; it has 0; give a path"):
        the_file("load", "package:tides", ".onnx")
