"""The command line: a mistake is one line and status 2, and nothing is written."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

import quaver as qv
from quaver import cli, recipe

MODEL = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 48, "context": 64}


@pytest.fixture
def paths(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(range(1, 256)) * 40)
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    return tmp_path


def flags(paths, **changes):
    values = {
        "data": paths / "text.txt",
        "model": paths / "model.json",
        "recipe": "f32",
        "steps": 3,
        "batch": 2,
        "seq": 16,
        "device": "cpu",
        "out": paths / "out",
    }
    values |= changes
    return ["train", *(str(x) for key, value in values.items() for x in (f"--{key}", value))]


def run(arguments, capsys):
    """Status, stdout and stderr of the command line."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as leaving:  # argparse
        status = leaving.code
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_train(paths, capsys):
    status, out, err = run(flags(paths, recipe="f32,fp8lm-o2"), capsys)
    assert (status, err) == (0, "")
    assert "fp8lm-o2  step 3/3  held-out" in out
    summary = json.loads((paths / "out" / "summary.json").read_text())
    assert list(summary["recipes"]) == ["f32", "fp8lm-o2"]
    assert summary["config"]["steps"] == 3
    assert summary["machine"]["torch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "many"}, "argument --steps: invalid int value: 'many'"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"device": "tpu"}, "argument --device: invalid choice: 'tpu'"),
        ({"recipe": "fp9"}, "--recipe: unknown recipe 'fp9'; there are f32, bf16"),
        ({"recipe": ""}, "--recipe names none"),
        ({"model": "huge"}, "unknown model 'huge'"),
        ({"model": "/no/such.json"}, "--model /no/such.json: no such file"),
        ({"data": "/no/such"}, "--data /no/such: no such file or folder"),
        ({"tokenizer": "/no/such"}, "--tokenizer /no/such: no such file"),
        ({"seq": 65}, "--seq 65 exceeds the model's context 64"),
        ({"out": "/dev/null"}, "--out /dev/null is not a folder"),
        ({"seed": 2**70}, "--seed must have at most 63 bits"),
        ({"steps": 10**20}, "--steps must be below 2^31"),
        ({"parallel": "dp=²"}, "--parallel wants dp=N"),
        ({"wings": 2}, "unrecognized arguments: --wings 2"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(paths, capsys, changes, message):
    status, out, err = run(flags(paths, **changes), capsys)
    assert (status, out) == (2, "")
    assert err.startswith(("quaver train: error: ", "quaver: error: "))
    assert message in err
    assert err.count("\n") == 1
    assert not (paths / "out").exists()


def test_too_short_data(paths, capsys):
    short = paths / "short.txt"
    short.write_text("short")
    status, _, err = run(flags(paths, data=short), capsys)
    assert status == 2
    assert err == (
        "quaver train: error: --data is too short: sequences of 16 need at least 34 tokens "
        "(17 to train on, 17 held out), found 5\n"
    )


def test_a_second_run_needs_to_say_what_it_wants(paths, capsys):
    assert run(flags(paths), capsys)[0] == 0
    status, _, err = run(flags(paths), capsys)
    assert status == 2
    assert "holds a run already" in err
    assert run([*flags(paths), "--resume"], capsys)[0] == 0
    assert run([*flags(paths, seed=4), "--overwrite"], capsys)[0] == 0
    status, _, err = run([*flags(paths), "--resume", "--overwrite"], capsys)
    assert status == 2
    assert "not allowed with argument" in err


def test_a_folder_that_cannot_be_written_is_one_line(paths, capsys):
    out = paths / "out"
    assert run(flags(paths), capsys)[0] == 0
    summary = out / "summary.json"
    summary.unlink()
    summary.mkdir()  # the end of the run cannot replace it
    status, _, err = run([*flags(paths), "--overwrite"], capsys)
    assert status == 1
    assert err.startswith("quaver train: error: ")
    assert err.count("\n") == 1


def test_no_command_and_version(capsys):
    status, _, err = run([], capsys)
    assert status == 2
    assert err == "quaver: error: the following arguments are required: COMMAND\n"
    status, out, _ = run(["--version"], capsys)
    assert (status, out) == (0, f"quaver {qv.__version__}\n")


def test_help_names_the_recipes(capsys):
    status, out, _ = run(["train", "--help"], capsys)
    assert status == 0
    assert ", ".join(recipe.names()) in " ".join(out.split()).replace("- ", "-")  # wrapped lines
    assert "(default: stdlib)" in " ".join(out.split())


def test_info_lists_the_gemm_kernels_and_says_why(capsys):
    status, out, err = run(["info", "--gemm", "4096", "4096", "8192"], capsys)
    assert (status, err) == (0, "")
    assert "e4m3_e4m3_fast_half_128x256" in out and "waves of 132 multiprocessors" in out
    wgrad = ["--types", "e5m2,e4m3,f32", "--accumulate", "--promoted"]
    status, out, _ = run(["info", "--gemm", "512", "512", "8192", *wgrad], capsys)
    assert status == 0 and "e5m2_e4m3_f32_128x128" in out and "fast" not in out
    blocks = ["--types", "e4m3,e4m3,f32", "--scales", "blocks"]
    status, out, _ = run(["info", "--gemm", "512", "512", "8192", *blocks], capsys)
    assert status == 0 and "e4m3_e4m3_blocks_f32_128x128" in out and "as the scales lie" in out
    for arch in ("sm_89", "sm_100", "sm_120"):
        flags = ["--arch", arch, "--sms", "128"]
        status, out, _ = run(["info", "--gemm", "4096", "4096", "8192", *flags], capsys)
        assert status == 0 and "mma_e4m3_e4m3_fast_half_128x128: 1024 tiles" in out
        assert "by mma.sync" in out and "e4m3_blocks" not in out
    status, out, _ = run(["info", "--gemm", "64", "50", "40"], capsys)
    assert status == 0 and "mma_e4m3_e4m3_half_64x64_bytes: 1 tiles" in out
    for wrong, message in (
        ("--arch sm_80", "no kernel multiplies FP8 on 'sm_80'"),
        ("--arch hopper", "no kernel multiplies FP8 on 'hopper'"),
        ("--arch sm_89 --scales blocks", "scales of 1 x 128 by 1 x 128, by mma.sync"),
        ("--types e5m2,e4m3,bf16 --scales tiles", "scales of 1 x 128 by 128 x 128"),
        ("--types e5m2,e5m2,bf16", "at least one operand must be e4m3"),
        ("--types e4m3,e4m3", "wants A,B,OUT"),
        ("--types e4m3,e4m3,e3m4", "unknown format 'e3m4'"),
        ("--sms 0", "got 0"),
        (f"--sms {2**40}", "--sms must be below 2^31"),
    ):
        status, _, err = run(["info", "--gemm", "16", "16", "16", *wrong.split()], capsys)
        assert status == 2 and message in err


def test_info(capsys):
    status, out, err = run(["info"], capsys)
    assert (status, err) == (0, "")
    assert str(qv.build_info()["version"]) in out
    for op in ("quantize", "dequantize", "cast_transpose", "gemm", "grad_norm", "adam_"):
        assert f"  {op} " in out
    assert "CUDA will" in out


@pytest.fixture
def tree(monkeypatch, tmp_path):
    """A source tree with one bench, which fails."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_one.py").write_text("import sys; sys.exit(7)")
    monkeypatch.setattr(qv, "__file__", str(tmp_path / "python" / "quaver" / "__init__.py"))


@pytest.mark.usefixtures("tree")
def test_bench(capsys):
    assert run(["bench", "one"], capsys)[0] == 7
    assert run(["bench"], capsys)[0] == 7
    status, _, err = run(["bench", "two"], capsys)
    assert (status, err) == (2, "quaver bench: error: no bench 'two': there are one\n")


def test_bench_outside_of_a_source_tree(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(qv, "__file__", str(tmp_path / "lib" / "quaver" / "__init__.py"))
    status, _, err = run(["bench"], capsys)
    assert status == 2
    assert "the benches are part of the source tree" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_with_130(paths, number):
    command = [sys.executable, "-m", "quaver", *flags(paths, steps=1_000_000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step 1/" in line:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "--resume continues" in out
    assert (paths / "out" / "f32" / "checkpoint" / "state.safetensors").is_file()


def test_a_terminal_gets_a_bar(paths):
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "quaver", *flags(paths, recipe="bf16")]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # how Linux tells that the other side has closed
            break
    os.close(ours)
    assert process.wait() == 0
    assert re.search(rb"bf16: 100%.*3/3 .*held-out \d\.\d{4}  [\d,]+ tokens/s", shown)
    assert b"step 3/3" not in shown
