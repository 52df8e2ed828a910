"""bench/results/*.json as markdown: what is judged, the CPU's speed, and the newest GPU report.

python bench/table.py            print them
python bench/table.py --write    put them into bench/README.md
"""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
WRITTEN = "written by `python bench/table.py --write`. -->"
GPU = (f"<!-- The GPU report: {WRITTEN}", "<!-- End of the GPU report. -->")
CPU = (f"<!-- The CPU's rows: {WRITTEN}", "<!-- End of the CPU's rows. -->")
NOTHING = "Nothing has been measured on a GPU yet: every row of the GPU's targets is open."


def rows(key):
    """Every row that has `key`, the bench that made it, and where."""
    for path in sorted(RESULTS.glob("*.json")):
        if path.name.startswith("gpu-"):
            continue
        result = json.loads(path.read_text())
        machine = result["machine"]
        where = f"{machine['cpu'].partition('(')[0].strip()}, {machine['isa']}"
        for row in result["rows"]:
            if key in row:
                yield row, path.stem, f"{where}, `{machine['commit']}`"


def _met(row):
    return "met" if row["met"] else "**missed**"


def judged_text():
    """Figures with a bar that do not depend on the machine, and one that hardly does."""
    lines = ["| what | figure | bar | | bench | where |", "|---|---|---|---|---|---|"]
    for row, bench, where in rows("wanted"):
        lines.append(
            f"| {row['name']} | {row['value']:.3f} | {row['wanted']} {row['bar']:g} | {_met(row)} "
            f"| {bench} | {where} |"
        )
    return "\n".join(lines)


def speed_text():
    lines = ["| what | baseline | ratio | quartiles | bar | where |", "|---|---|---|---|---|---|"]
    for row, _, where in rows("ratio"):
        verdict = f"{row['bar']:g}: {_met(row)}" if "bar" in row else "-"
        low, high = row["iqr"]
        lines.append(
            f"| {row['name']} | {row['baseline']} | {row['ratio']:.2f} x | {low:.2f} - {high:.2f} "
            f"| {verdict} | {where} |"
        )
    return "\n".join(lines)


def cpu_text():
    return f"{judged_text()}\n\nSpeed, as a ratio to the baseline:\n\n{speed_text()}"


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
    lines = ["| trained | tokens/s | against bf16 | peak memory, GiB | held-out loss | steps |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        ratio = f"{row['ratio']:.2f} x" if "ratio" in row else "-"
        peak = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f}"
        loss = "not finite" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        lines.append(
            f"| {row['name']} | {row['tokens_per_s']:,.0f} | {ratio} | {peak} | {loss} "
            f"| {row['steps']} |"
        )
    return "\n".join(lines)


def readme_section(folder=RESULTS):
    begin, end = GPU
    return f"{begin}\n\n{gpu_text(newest(folder))}\n\n{end}"


def cpu_section():
    begin, end = CPU
    return f"{begin}\n\n{cpu_text()}\n\n{end}"


def write_readme(path=README, folder=RESULTS):
    text = path.read_text()
    for (begin, end), section in ((CPU, cpu_section()), (GPU, readme_section(folder))):
        text = text[: text.index(begin)] + section + text[text.index(end) + len(end) :]
    path.write_text(text)


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
