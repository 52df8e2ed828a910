"""Batches are a pure function of (seed, step); sources keep their order; errors name the source."""

import json

import pytest
import torch

from quaver import data


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path


@pytest.fixture
def text(tmp_path):
    return str(write(tmp_path / "text.txt", bytes(range(256)) * 40))


def test_batch_is_the_text_at_its_offset(text):
    source = data.load([text], 32)
    inputs, targets = source.batch(seed=3, step=7, batch=5, length=32)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    # The text counts up modulo 256, so the next token is known.
    assert torch.equal(targets, (inputs + 1) % 256)


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
    text = torch.randint(0, 256, (1000,), dtype=torch.uint8).numpy().tobytes()
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
    texts, skipped = data.read_sources([str(root)])
    assert texts == [b"first", b"second"]
    assert skipped == [binary]
    assert data.read_sources([str(binary)])[0] == [b"x\0y"]


def test_stdlib_is_sorted_text_without_installed_packages():
    files = data.stdlib_files()
    names = [file.as_posix() for file in files]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    first, second = data.load(["stdlib"], 64), data.load(["stdlib"], 64)
    assert len(first.train) > 2**20
    assert first.fingerprint == second.fingerprint
    assert bytes(first.train[:40].tolist()) == files[0].read_bytes()[:40]


def test_the_stdlib_stops_at_its_cap(monkeypatch):
    monkeypatch.setattr(data, "STDLIB_CAP", 100_000)
    texts, _ = data.read_sources(["stdlib"])
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


def test_tokenizer_file(tmp_path):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    words = {"[UNK]": 0, "one": 1, "two": 2, "three": 9}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
    }
    tokenizer = write(tmp_path / "tokenizer.json", json.dumps(spec).encode())
    text = write(tmp_path / "t", b"one two three four " * 20)
    source = data.load([str(text)], 16, tokenizer=str(tokenizer))
    assert source.vocab == 10
    assert source.train[:5].tolist() == [1, 2, 9, 0, 1]


def test_bad_tokenizer_files_are_named(tmp_path):
    text = str(write(tmp_path / "t", b"x" * 100))
    with pytest.raises(data.DataError, match=r"--tokenizer /no/such: no such file"):
        data.load([text], 16, tokenizer="/no/such")
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    bad = write(tmp_path / "bad.json", b"{}")
    with pytest.raises(data.DataError, match=r"--tokenizer .*bad.json: "):
        data.load([text], 16, tokenizer=str(bad))
