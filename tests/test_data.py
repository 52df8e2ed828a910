"""Batches are a pure function of (seed, step); sources keep their order; errors name the source."""

import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from quaver import data, documents, tokens
from quaver.errors import UsageError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path


@pytest.fixture
def text(tmp_path):
    return str(write(tmp_path / "text.txt", bytes(range(1, 256)) * 40))


def test_batch_is_the_text_at_its_offset(text):
    source = data.load([text], 32)
    inputs, targets = source.batch(seed=3, step=7, batch=5, length=32)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    # The text counts up from 1 to 255 again and again, so the next token is known.
    assert torch.equal(targets, inputs % 255 + 1)


def test_batch_depends_on_seed_step_and_micro_alone(text):
    first, second = data.load([text], 32), data.load([text], 32)
    second.batch(0, 1, 4, 32)  # an earlier draw must not shift later ones
    torch.manual_seed(9)
    same = second.batch(0, 5, 4, 32, micro=2)
    assert all(map(torch.equal, first.batch(0, 5, 4, 32, micro=2), same))
    for other in ((1, 5, 2), (0, 6, 2), (0, 5, 3)):
        seed, step, micro = other
        assert not torch.equal(first.batch(seed, step, 4, 32, micro=micro)[0], same[0])


def test_the_held_out_tail_is_never_trained_on(tmp_path):
    path = write(tmp_path / "t", b"a" * 950 + b"b" * 50)
    source = data.load([str(path)], 16)
    seen = torch.cat([torch.cat(source.batch(0, step, 8, 16)) for step in range(50)])
    assert (seen == ord("a")).all()
    windows = list(source.validation(4, 16))
    assert all((x == ord("b")).all() and (y == ord("b")).all() for x, y in windows)
    assert all(map(torch.equal, windows[0], next(iter(source.validation(4, 16)))))


def test_validation_covers_the_tail_from_end_to_end(tmp_path):
    text = torch.randint(1, 256, (1000,), dtype=torch.uint8).numpy().tobytes()
    source = data.load([str(write(tmp_path / "t", text))], 10)
    inputs = torch.cat([x for x, _ in source.validation(3, 10)])
    targets = torch.cat([y for _, y in source.validation(3, 10)])
    assert torch.equal(inputs[0], source.held_out[:10].long())
    assert torch.equal(targets[-1], source.held_out[-10:].long())


def test_shortest_data_that_is_accepted(tmp_path):
    source = data.load([str(write(tmp_path / "t", b"x" * 34))], 16)
    assert len(source.train) == len(source.held_out) == 17
    assert source.batch(0, 1, 2, 16)[0].shape == (2, 16)
    with pytest.raises(data.DataError, match=r"need at least 34 tokens .* found 33"):
        data.load([str(write(tmp_path / "u", b"x" * 33))], 16)


@pytest.mark.parametrize("text", [b"", b"x"])
def test_empty_data_is_too_short(tmp_path, text):
    with pytest.raises(data.DataError, match="too short"):
        data.load([str(write(tmp_path / "t", text))], 16)


def test_folder_is_read_in_order_without_binaries_and_hidden_files(tmp_path):
    root = tmp_path / "folder"
    write(root / "b.txt", b"second")
    write(root / "a" / "z.txt", b"first")
    binary = write(root / "c.bin", b"x\0y")
    write(root / ".hidden", b"no")
    write(root / ".git" / "config", b"no")
    notes = documents.Notes()
    assert list(documents.documents([str(root)], "text", notes)) == [b"first", b"second"]
    assert notes.binary == [binary]
    assert str(notes) == f"left out 1 binary files, such as {binary}"


def test_stdlib_is_sorted_text_without_installed_packages():
    files = documents.stdlib_files()
    names = [file.as_posix() for file in files]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    first, second = data.load(["stdlib"], 64), data.load(["stdlib"], 64)
    assert len(first.train) > 2**20
    assert first.fingerprint == second.fingerprint
    assert bytes(first.train[:40].tolist()) == files[0].read_bytes()[:40]


def test_the_stdlib_stops_at_its_cap(monkeypatch):
    monkeypatch.setattr(documents, "STDLIB_CAP", 100_000)
    texts = list(documents.documents(["stdlib"], "text", documents.Notes()))
    assert 0 < sum(map(len, texts)) <= 100_000


def test_fingerprint_tells_texts_apart(tmp_path):
    one = data.load([str(write(tmp_path / "a", b"x" * 100))], 16)
    two = data.load([str(write(tmp_path / "b", b"x" * 99 + b"y"))], 16)
    assert one.fingerprint != two.fingerprint


def test_missing_and_special_sources_are_named(tmp_path):
    with pytest.raises(data.DataError, match=r"--data /no/such: no such file or folder"):
        data.load(["/no/such"], 16)
    with pytest.raises(data.DataError, match=r"--data /dev/null: neither a file nor a folder"):
        data.load(["/dev/null"], 16)


def read(paths, column="text"):
    """The documents of files, and what was left out."""
    notes = documents.Notes()
    return list(documents.documents([str(path) for path in paths], column, notes)), notes


def lines(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def test_rows_of_jsonl_and_parquet_are_documents(tmp_path):
    rows = [{"id": 1, "text": "one"}, {"id": 2, "text": ""}, {"id": 3, "text": "drei\u00df"}]
    wanted = [b"one", "drei\u00df".encode()]
    table = tmp_path / "a [b]*" / "t.parquet"  # a path is no pattern
    table.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), table)
    first = lines(tmp_path / "t.jsonl", [*rows, {"id": 4}])
    packed = write(tmp_path / "t.jsonl.gz", gzip.compress(first.read_bytes()))
    assert read([table])[0] == read([first])[0] == read([packed])[0] == wanted
    found, notes = read([first, table])
    assert found == wanted * 2 and notes.empty == 3
    assert str(notes) == "left out 3 rows without text"
    # In a folder too, beside text.
    write(tmp_path / "a [b]*" / "u.txt", b"two")
    assert read([table.parent])[0] == [*wanted, b"two"]
    assert read([write(tmp_path / "empty.jsonl", b"")])[0] == []


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.csv", b"a,b", r"data of unknown kind \(\.csv\); wanted \.jsonl, .* or text such as"),
    ("a.bin", b"ab", r"data of unknown kind \(\.bin\)"),
    ("a.txt", b"a\0b", r"a\.txt: binary data \(a byte of 0\)"),
    ("README", b"a\0b", r"README: binary data"),
    ("a.jsonl", b'{"body": "x"}\n', r"no field 'text' among body; --text-field names the one"),
    ("a.jsonl", b'{"text": 4}\n', r"row 1: 'text' is a int, wanted text"),
    ("a.jsonl", b'{"text": "x"}\n{"te', r"a\.jsonl: cannot be read: "),
    ("a.parquet", b"PAR1", r"a\.parquet: cannot be read: "),
])  # fmt: skip
def test_wrong_files_are_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(data.DataError, match=f"--data .*{message}") as error:
        read([path])
    assert str(error.value).count("\n") == 0


def test_a_parquet_file_without_the_column(tmp_path):
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), tmp_path / "t.parquet")
    with pytest.raises(data.DataError, match="no field 'text' among content, n; --text-field"):
        read([tmp_path / "t.parquet"])
    assert read([tmp_path / "t.parquet"], "content")[0] == [b"a"]


def test_tables_without_the_package_are_refused(tmp_path, monkeypatch):
    path = lines(tmp_path / "t.jsonl", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.DataError, match=r"needs the package `datasets`: pip install quaver"):
        read([path])


WHOLE = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
WORDS = {"[UNK]": 0, "one": 1, "two": 2, "three": 9}


def word_tokenizer(path, **more):
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "special": True, **WHOLE} for text, i in more.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": WORDS | more, "unk_token": "[UNK]"},
    }
    return str(write(path, json.dumps(spec).encode()))


def test_documents_end_with_the_end_token(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", **{"<eos>": 5})
    found = {"a.txt": b"one two three four", "b.txt": b"two <eos>", "c.txt": b""}
    texts = [write(tmp_path / name, text) for name, text in found.items()]
    coder = tokens.load_coder("--tokenizer", path)
    assert (coder.vocab, coder.end) == (10, 5)
    assert coder.encode(read(texts)[0]).tolist() == [1, 2, 9, 0, 5, 2, 5, 5]
    source = data.load([str(texts[0])] * 20, 16, coder)
    assert source.vocab == 10 and source.train[:7].tolist() == [1, 2, 9, 0, 5, 1, 2]
    assert source.decode([1, 2]) == "one two"
    assert data.load(["stdlib"], 16).decode([104, 105]) == "hi"
    named = tokens.load_coder("--tokenizer", path, end="three")
    assert named.encode([b"one"]).tolist() == [1, 9]
    named.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "three"


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    path = word_tokenizer(tmp_path / "endless.json")
    with pytest.raises(data.DataError, match=r"endless\.json: the tokenizer has no end token, by"):
        tokens.load_coder("--tokenizer", path)
    with pytest.raises(data.DataError, match=r"--end-token <s>: the tokenizer of .* no such token"):
        tokens.load_coder("--tokenizer", path, "<s>")


def test_bad_tokenizer_files_are_named(tmp_path):
    with pytest.raises(data.DataError, match=r"--tokenizer /no/such: no such file"):
        tokens.load_coder("--tokenizer", "/no/such")
    bad = write(tmp_path / "bad.json", b"{}")
    with pytest.raises(data.DataError, match=r"--tokenizer .*bad.json: "):
        tokens.load_coder("--tokenizer", str(bad))
    with pytest.raises(UsageError, match=r"the folder has no tokenizer \(tokenizer.json\)"):
        tokens.load_coder("--tokenizer", str(tmp_path))
