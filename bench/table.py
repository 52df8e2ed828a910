"""bench/results/*.json as markdown: the CPU's rows, and the newest GPU report.

python bench/table.py            print both
python bench/table.py --write    put the GPU report into bench/README.md
"""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
BEGIN = "<!-- The GPU report: written by `python bench/table.py --write`. -->"
END = "<!-- End of the GPU report. -->"
NOTHING = "Nothing has been measured on a GPU yet: every row of the GPU's targets is open."


def rows():
    for path in sorted(RESULTS.glob("*.json")):
        if path.name.startswith("gpu-"):
            continue
        result = json.loads(path.read_text())
        commit = result["machine"]["commit"]
        for row in result["rows"]:
            if "ratio" in row:
                yield row, commit


def cpu_text():
    lines = ["| what | baseline | ratio | quartiles | bar | commit |", "|---|---|---|---|---|---|"]
    for row, commit in rows():
        bar = row.get("bar")
        verdict = "-" if bar is None else f"{bar:g}: {'met' if row['met'] else '**missed**'}"
        low, high = row["iqr"]
        lines.append(
            f"| {row['name']} | {row['baseline']} | {row['ratio']:.2f} x | {low:.2f} - {high:.2f} "
            f"| {verdict} | `{commit}` |"
        )
    return "\n".join(lines)


def newest(folder=RESULTS):
    """The GPU report that was started last, or None."""
    found = [json.loads(path.read_text()) for path in folder.glob("gpu-*.json")]
    return max(found, key=lambda result: result["started"], default=None)


def gpu_text(result):
    """A GPU report as markdown: where it comes from, its steps, targets and rows."""
    if result is None:
        return NOTHING
    parts = [_source(result), _steps(result), _targets(result["targets"]), _rows(result["rows"])]
    trained = [row for row in result["rows"] if row["step"] == "train"]
    return "\n\n".join(parts + ([_training(trained)] if trained else []))


def _source(result):
    gpu, machine, build = result["gpu"], result["machine"] or {}, result["build"] or {}
    tests = result["tests"]
    counted = "no tests were counted"
    if tests is not None:
        counted = "{passed} passed, {failed} failed, {skipped} skipped".format(**tests)
    return (
        f"{gpu['name']}, driver {gpu['driver']}, torch {gpu['torch']}, "
        f"{machine.get('cores', '?')} cores of {machine.get('cpu', 'an unknown CPU')}; commit "
        f"`{result['commit']}`, {build.get('how', 'not built')}; {result['started']}, "
        f"{result['seconds']} s. GPU tests: {counted}."
    )


def _steps(result):
    lines = ["| step | result | SM clock, MHz | power, W |", "|---|---|---|---|"]
    for name, step in result["steps"].items():
        said = step["status"] if step["status"] == "passed" else f"**{step['status']}**"
        if "reason" in step:
            said += f": {_cell(step['reason'])}"
        clock, power = (_range(step, key) for key in ("sm_mhz", "power_w"))
        lines.append(f"| {name} | {said} | {clock} | {power} |")
    return "\n".join(lines)


def _cell(text):
    return " ".join(str(text).replace("|", "/").split())[:200]


def _range(step, key):
    value = step.get("clocks", {}).get(key)
    return "-" if value is None else "{min:.0f} - {median:.0f} - {max:.0f}".format(**value)


def _wanted(target):
    parts = [f"worst {target['worst']:.2f}"]
    if target["geomean"] is not None:
        parts.append(f"mean {target['geomean']:.2f}")
    return ", ".join(parts)


def _targets(results):
    lines = ["| target | against | worst | mean | wanted | met |", "|---|---|---|---|---|---|"]
    for result in results.values():
        found = ("-", "-")
        if result["rows"]:
            found = (f"{result['worst']:.2f} x", f"{result['geomean']:.2f} x")
        met = {True: "met", False: "**missed**", None: "open"}[result["met"]]
        if result.get("stretched"):
            met += ", stretch too"
        if "reason" in result:
            met += f": {_cell(result['reason'])}"
        lines.append(
            f"| {result['what']} | {result['baseline']} | {found[0]} | {found[1]} "
            f"| {_wanted(result['target'])} | {met} |"
        )
    return "\n".join(lines)


def _rows(rows):
    lines = ["| row | against | ratio | quartiles | us | GB/s | TFLOP/s |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        if row["step"] == "train":
            continue
        name = f"{row['name']} ({row['step']})"
        if "ratio" not in row:
            lines.append(f"| {name} | {row['baseline']} | {_cell(row['reason'])} | | | | |")
            continue
        low, high = row["iqr"]
        if row.get("host_bound", 0) > 0.1:
            name += ", bound by the host"
        gb = f"{row['gb_per_s']:.0f}" if "gb_per_s" in row else "-"
        tflop = f"{row['tflop_per_s']:.0f}" if "tflop_per_s" in row else "-"
        lines.append(
            f"| {name} | {row['baseline']} | {row['ratio']:.2f} x | {low:.2f} - {high:.2f} "
            f"| {row['candidate_s'] * 1e6:.1f} | {gb} | {tflop} |"
        )
    return "\n".join(lines)


def _training(rows):
    lines = ["| trained | tokens/s | against bf16 | peak memory, GiB | final loss | steps |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        ratio = f"{row['ratio']:.2f} x" if "ratio" in row else "-"
        peak = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f}"
        loss = "not finite" if row["final_loss"] is None else f"{row['final_loss']:.4f}"
        lines.append(
            f"| {row['name']} | {row['tokens_per_s']:,.0f} | {ratio} | {peak} | {loss} "
            f"| {row['steps']} |"
        )
    return "\n".join(lines)


def readme_section(folder=RESULTS):
    return f"{BEGIN}\n\n{gpu_text(newest(folder))}\n\n{END}"


def write_readme(path=README, folder=RESULTS):
    text = path.read_text()
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    path.write_text(text[:begin] + readme_section(folder) + text[end:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update bench/README.md")
    if parser.parse_args().write:
        write_readme()
        return
    print(cpu_text())
    print()
    print(gpu_text(newest()))


if __name__ == "__main__":
    main()
