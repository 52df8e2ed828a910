"""Tables of measured kernels: what they change, how `quaver tune-gemm` writes one, what is refused.
No GPU measures here: times are made up."""

import json
from dataclasses import asdict

import pytest

import quaver as qv
from quaver import _C, cli, gemm_table
from quaver.errors import FileError, UsageError
from quaver.gemm_table import Product

GPU = "a GPU", 132, "sm_90"
PRODUCT = Product(4096, 4096, 4096)


@pytest.fixture(autouse=True)
def no_table_after():
    yield
    qv.use_gemm_table(None)


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU on which the last kernel of the model's order is the fastest."""

    def on_gpu(product):
        names = [found["name"] for found in product.candidates(GPU[1])[0]]
        return lambda kernel: 1e-6 * (len(names) - names.index(kernel))

    monkeypatch.setattr(gemm_table, "_gpu", lambda: GPU)
    monkeypatch.setattr(gemm_table, "_OnGpu", on_gpu)


def kernels(product):
    return [found["name"] for found in product.candidates(GPU[1])[0]]


def chosen(product):
    return _C.choose_gemm(asdict(product), GPU[1])


def tuned(path, *flags):
    return cli.main(["tune-gemm", *flags, "--table", str(path)])


def test_a_table_comes_before_the_model_for_its_products_alone(gpu, tmp_path, capsys):
    other = Product(4096, 4096, 8192)
    before = chosen(PRODUCT), chosen(other)
    assert before == (kernels(PRODUCT)[0], kernels(other)[0])
    assert tuned(tmp_path / "gemm.json", "4096x4096x4096") == 0
    assert kernels(PRODUCT)[-1] in capsys.readouterr().out
    qv.use_gemm_table(tmp_path / "gemm.json")
    assert (chosen(PRODUCT), chosen(other)) == (kernels(PRODUCT)[-1], before[1])
    # A choice that a thread has made follows the table.
    qv.use_gemm_table(None)
    assert (chosen(PRODUCT), chosen(other)) == before


@pytest.mark.parametrize(
    ("flags", "product"),
    [
        (("--accumulate", "--types", "e4m3,e5m2,f32"),
         Product(256, 512, 1024, b="e5m2", out="f32", accumulate=True)),
        (("--promoted",), Product(256, 512, 1024, fast_accumulate=False)),
        (("--scales", "tiles", "--promoted"),
         Product(256, 512, 1024, fast_accumulate=False, scales="tiles")),
    ],
)  # fmt: skip
def test_flags_name_the_product(gpu, tmp_path, flags, product):
    assert tuned(tmp_path / "gemm.json", "256x512x1024", *flags) == 0
    qv.use_gemm_table(tmp_path / "gemm.json")
    assert chosen(product) == kernels(product)[-1]


def test_products_are_added_to_a_table_and_measured_again(gpu, tmp_path):
    path = tmp_path / "gemm.json"
    for shapes in (["64x64x64", "128x128x128"], ["128x128x128"], ["256x256x256"]):
        assert tuned(path, *shapes) == 0
    assert [row["m"] for row in gemm_table.read(path)["products"]] == [64, 128, 256]


def test_sizes_are_those_to_which_layers_pad(gpu, tmp_path):
    assert tuned(tmp_path / "gemm.json", "8200x50x40") == 0
    (row,) = gemm_table.read(tmp_path / "gemm.json")["products"]
    assert (row["m"], row["n"], row["k"]) == (8208, 64, 48)


def test_a_measurement_leaves_no_table(gpu, tmp_path, monkeypatch):
    def on_gpu(product):
        def seconds(kernel):
            _C.set_gemm_table([(asdict(product), kernels(product)[-1])])
            raise RuntimeError("out of memory")

        return seconds

    monkeypatch.setattr(gemm_table, "_OnGpu", on_gpu)
    with pytest.raises(RuntimeError, match="out of memory"):
        tuned(tmp_path / "gemm.json", "4096x4096x4096")
    assert chosen(PRODUCT) == kernels(PRODUCT)[0]


def test_kernels_take_turns_and_the_median_counts():
    times = iter([1, 9, 2, 1, 3, 1, 4, 1, 90, 1])  # of a and b in turn
    found = gemm_table.measure(["a", "b"], lambda kernel: 1e-6 * next(times))
    assert found == pytest.approx({"b": 1, "a": 3}) and list(found) == ["b", "a"]


def test_a_table_of_another_gpu_is_refused(gpu, tmp_path, capsys, monkeypatch):
    path = tmp_path / "gemm.json"
    tuned(path, "64x64x64")
    monkeypatch.setattr(gemm_table, "_gpu", lambda: ("another", 78, "sm_90"))
    with pytest.raises(UsageError, match=r"the table is of a GPU \(sm_90, 132 .* is another"):
        qv.use_gemm_table(path)
    assert tuned(path, "64x64x64") == 2 and "name another --table" in capsys.readouterr().err
    assert len(gemm_table.read(path)["products"]) == 1


def test_without_a_gpu_tables_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("quaver.machine.why_not_cuda", lambda: "no driver")
    assert tuned(tmp_path / "gemm.json", "64x64x64") == 2
    assert "there is none: no driver" in capsys.readouterr().err
    assert not (tmp_path / "gemm.json").exists()


def damaged(change):
    table = {"gpu": GPU[0], "multiprocessors": GPU[1], "arch": GPU[2]}
    row = {**asdict(PRODUCT), "kernel": kernels(PRODUCT)[0], "microseconds": {}}
    table["products"] = [row]
    change(table, row)
    return json.dumps(table)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table, row: table.pop("gpu"), "wanted an object of gpu, multi"),
        (lambda table, row: row.pop("kernel"), "wanted an object of m, n, k"),
        (lambda table, row: row.update(m="4096"), "m must be int, got '4096'"),
        (lambda table, row: row.update(accumulate=1), "accumulate must be bool, got 1"),
        (lambda table, row: row.update(kernel="none"), r"no kernel none serves \[4096, 4096\]"),
        (lambda table, row: row.update(a="int8"), "unknown"),
        (lambda table, row: row.update(m=0), "empty product"),
        (lambda table, row: table["products"].append(row), "comes twice"),
    ],
)
def test_a_damaged_table_is_refused_and_changes_nothing(gpu, tmp_path, change, reason):
    path = tmp_path / "gemm.json"
    tuned(path, "64x64x64")
    qv.use_gemm_table(path)
    used = Product(64, 64, 64)
    path.write_text(damaged(change))
    with pytest.raises(FileError, match=f"gemm.json: .*{reason}"):
        qv.use_gemm_table(path)
    assert chosen(used) == kernels(used)[-1]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"gpu": 1}'])
def test_a_file_that_is_no_table_is_refused(gpu, tmp_path, text):
    (tmp_path / "gemm.json").write_text(text)
    with pytest.raises(FileError, match="no table of `quaver tune-gemm`"):
        qv.use_gemm_table(tmp_path / "gemm.json")
    with pytest.raises(FileError, match="no such file"):
        qv.use_gemm_table(tmp_path / "none.json")


@pytest.mark.parametrize("shape", ["64", "64x64", "0x64x64", "64x64x64x64", "axbxc", "-1x2x3"])
def test_a_shape_that_is_none_is_refused(gpu, tmp_path, shape, capsys):
    assert tuned(tmp_path / "gemm.json", shape) == 2
    assert "MxNxK" in capsys.readouterr().err
