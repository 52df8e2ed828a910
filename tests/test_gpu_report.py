"""The GPU report as far as it goes without a GPU: plan, runner, table and carried builds."""

import json
import sys
import zipfile

import bench_gemm
import bench_kernels
import bench_layer
import bench_optimizer
import bench_quantize
import gpu_build
import gpu_plan
import gpu_report
import pytest
import table
import targets
import torch
from gpu_plan import Step

BENCHES = (bench_gemm, bench_quantize, bench_optimizer, bench_kernels, bench_layer)


def test_the_plan_is_sound():
    names = [step.name for step in gpu_plan.PLAN]
    assert len(set(names)) == len(names)
    assert sum(step.seconds for step in gpu_plan.PLAN) <= gpu_plan.SECONDS < 600
    filled = {}
    benches = BENCHES
    listed = {case.target for bench in benches for case in bench.cases("cuda")}
    for i, step in enumerate(gpu_plan.PLAN):
        assert set(step.needs) <= set(names[:i])
        assert gpu_report.missing_files(step.command) == []
        filled |= dict.fromkeys(step.targets, step.name)
    assert filled == {key: target.step for key, target in targets.TARGETS.items()}
    assert set(filled) == listed - {None}


@pytest.mark.slow
def test_a_dry_run_finds_nothing_missing(tmp_path, capsys):
    assert gpu_report.dry_run(tmp_path) == []
    shown = capsys.readouterr().out
    assert all(f"\n{step.name}: {step.seconds} s" in shown for step in gpu_plan.PLAN)


def test_a_dry_run_names_what_is_missing(tmp_path, monkeypatch, capsys):
    broken = (
        Step("one", 1, "-", ("{python}", "bench/no_such_bench.py")),
        Step("two", 600, "-", python(""), python("import sys; sys.exit('no such flag')")),
        Step("three", 1, "-", python(""), python("print()"), targets=("cast",)),
    )
    monkeypatch.setattr(gpu_plan, "PLAN", broken)
    monkeypatch.setattr(gpu_report, "_recipes", lambda path: ["bf16"])
    problems = gpu_report.dry_run(tmp_path)
    assert problems[0] == "one: bench/no_such_bench.py is missing"
    assert problems[1].endswith("gave 1: no such flag")
    assert problems[2] == "three: no row for the target cast"
    assert problems[3] == f"the plan takes 602 s, more than {gpu_plan.SECONDS}"
    assert problems[4] == "no row fills the target gemm-fast"


def python(code):
    return ("{python}", "-c", code.replace("{", "{{").replace("}", "}}"))


ROW = '{"rows": [{"name": "r", "baseline": "b", "target": "cast", "ratio": 0.5, "iqr": [0, 1]}]}'
BUILD = {
    "path": "/nowhere", "bench_cuda": None, "recipes": ["bf16"], "how": "carried", "info": {},
    "ops": {}, "sources": "0", "commit": "abc", "machine": {"cpu": "a CPU", "cores": 2},
}  # fmt: skip


def plan(work):
    build = f"open({str(work / 'build.json')!r}, 'w').write({json.dumps(BUILD)!r})"
    rows = f"open({str(work / 'rows.json')!r}, 'w').write({ROW!r}); raise SystemExit('broken')"
    return (
        Step("build", 20, "-", python(build), needs=()),
        Step("leaves rows and fails", 20, "-", python(rows), rows="rows.json", targets=("cast",)),
        Step("needs it", 20, "-", python(""), needs=("leaves rows and fails",)),
        Step("C++", 20, "-", ("{bench_cuda}", "--check")),
        Step("tool", 20, "-", python(""), tool="no-such-tool"),
        Step("no rows", 20, "-", python(""), rows="none.json", targets=("layer",)),
    )


def test_a_step_that_fails_does_not_stop_the_others(tmp_path):
    results, build = gpu_report.run_plan(plan(tmp_path), tmp_path)
    assert build == BUILD
    said = {name: (one["status"], one.get("reason")) for name, one in results.items()}
    assert said == {
        "build": ("passed", None),
        "leaves rows and fails": ("failed", "status 1: broken"),
        "needs it": ("skipped", "leaves rows and fails failed"),
        "C++": ("skipped", "the build has no C++ bench"),
        "tool": ("skipped", "no-such-tool is not on this machine"),
        "no rows": ("passed", None),
    }
    rows = gpu_report.collect(plan(tmp_path), results, tmp_path)
    assert [(row["target"], row.get("ratio"), row.get("reason")) for row in rows] == [
        ("cast", 0.5, None),
        ("layer", None, "no rows left no such row"),
    ]


def test_a_step_has_its_time_and_what_the_others_left(tmp_path):
    took = {"early": 4.0, "late": 16.0}
    given, time = {}, [100.0]

    def run(command, env, log, seconds):
        given[log.stem] = seconds
        time[0] += took[log.stem]
        return "passed", None

    steps = [Step(name, s, "-", python(""), needs=()) for name, s in
             (("early", 10), ("late", 10), ("last", 0))]  # fmt: skip
    results, _ = gpu_report.run_plan(steps, tmp_path, run, lambda: time[0])
    assert given == {"early": 10.0, "late": 16.0}
    assert results["late"]["seconds"] == 16.0
    assert (results["last"]["status"], results["last"]["reason"]) == (
        "skipped", "no time was left")  # fmt: skip


def test_a_step_that_runs_out_of_time_is_stopped_with_its_children(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    command = gpu_report.fill(python(code), {"python": sys.executable})
    status, note = gpu_report.execute(command, gpu_report.environment(), tmp_path / "log", 0.0)
    assert (status, note) == ("timed out", "stopped after 0 s")


def a_report(tmp_path, started="2026-01-02T03:04:05Z"):
    (tmp_path / "train").mkdir(exist_ok=True)
    result = {"tokens_per_s": 100.0, "peak_memory": 2**30, "final_loss": 1.5, "val_loss": 1.6,
              "steps": 10, "skipped": 0}  # fmt: skip
    recipes = {"bf16": result, "fp8lm-o2": result | {"tokens_per_s": 150.0, "val_loss": None}}
    (tmp_path / "train" / "summary.json").write_text(json.dumps({"recipes": recipes}))
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><skipped/></testcase>'
        '<testcase classname="t" name="c"><failure/></testcase></testsuite></testsuites>'
    )
    results, build = gpu_report.run_plan(plan(tmp_path), tmp_path)
    one = {"name": "A GPU 80GB", "driver": "1.2", "torch": "2.11.0"}
    report = gpu_report.report(one, plan(tmp_path), results, build, tmp_path, 7)
    return report | {"started": started}


def test_the_report_and_its_table(tmp_path):
    report = json.loads(json.dumps(a_report(tmp_path)))
    assert report["schema"] == 1 and report["commit"] == "abc" and report["seconds"] == 7
    assert report["tests"] == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["t::c"]}
    assert report["targets"]["cast"]["met"] is False
    trained = {row["name"]: row for row in report["rows"] if row["step"] == "train"}
    assert trained["quaver train, fp8lm-o2"]["ratio"] == 1.5
    report["rows"][0] |= {"candidate_s": 1e-5}
    text = table.gpu_text(report)
    assert "A GPU 80GB, driver 1.2" in text and "1 passed, 1 failed, 1 skipped" in text
    assert "| leaves rows and fails | **failed**: status 1: broken | - | - |" in text
    assert (
        "| quantize | a copy of the same bytes | 0.50 x | 0.50 x | worst 0.93 | **missed** |"
        in text
    )
    assert "| open: no rows left no such row |" in text
    assert "| quaver train, fp8lm-o2 | 150 | 1.50 x | 1.00 | not finite | 10 |" in text
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(columns) == {5, 7, 8}


def test_the_readme_shows_the_newest_results(tmp_path):
    assert table.newest(tmp_path) is None
    assert table.NOTHING in table.readme_section(tmp_path)
    for name, started in (("a", "2026-01-02"), ("b", "2026-03-01"), ("c", "2026-02-01")):
        report = {"started": started, "name": name}
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(report))
    assert table.newest(tmp_path)["name"] == "b"
    shown = table.README.read_text()
    assert table.readme_section() in shown
    assert table.cpu_section() in shown


@pytest.mark.slow
def test_without_a_gpu_nothing_is_written(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(sys, "argv", ["gpu_report.py"])
    before = sorted(table.RESULTS.iterdir())
    with pytest.raises(SystemExit, match="no GPU to report on"):
        gpu_report.main()
    assert sorted(table.RESULTS.iterdir()) == before


def test_a_carried_build_must_be_of_these_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_build, "STAMP", tmp_path / "dist" / "carried.json")
    (tmp_path / "dist").mkdir()
    monkeypatch.setattr(gpu_build, "SOURCES", ("setup.py",))
    (tmp_path / "setup.py").write_text("as it was")
    with pytest.raises(gpu_build.BuildError, match=r"no dist/carried\.json"):
        gpu_build.carried(tmp_path)
    gpu_build.stamp()
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    with pytest.raises(gpu_build.BuildError, match=f"neither dist/quaver-.*{tag}"):
        gpu_build.carried(tmp_path)
    with zipfile.ZipFile(
        tmp_path / "dist" / f"quaver-1-cp39.{tag}-cp39.{tag}-linux.whl", "w"
    ) as wheel:
        wheel.writestr("quaver/__init__.py", "x = 1")
    site = gpu_build.carried(tmp_path / "work")
    assert (site / "quaver" / "__init__.py").read_text() == "x = 1"
    assert gpu_build.choose(tmp_path / "work", "auto", ["nvcc"]) == ("carried", site)
    (tmp_path / "setup.py").write_text("changed")
    with pytest.raises(gpu_build.BuildError, match="other sources"):
        gpu_build.carried(tmp_path)
    with pytest.raises(gpu_build.BuildError, match=r"nvcc is missing; nor carried: .* other"):
        gpu_build.choose(tmp_path, "auto", ["nvcc"])
    monkeypatch.setattr(gpu_build, "build", lambda: "here")
    assert gpu_build.choose(tmp_path, "auto", []) == ("built here", "here")
