"""`make gpu-report`: everything that a machine with one Hopper GPU can prove, in one command and
under nine minutes, into bench/results/gpu-NAME.json and a table.

The steps are gpu_plan.py's. A step that fails, is skipped or runs out of time is reported and does
not stop the others. `--dry-run` walks all steps on any machine: it shows the plan, checks that
every file is there, and runs what a step offers for that. Standard library alone: the
measuring is done by the steps.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import clocks
import gpu_build
import gpu_plan
import table
import targets

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "report"
SCHEMA = 1
TOOLS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
ASK_GPU = """
import json, torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} finds no GPU")
p = torch.cuda.get_device_properties(0)
print(json.dumps({
    "name": p.name, "capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count,
    "memory": p.total_memory, "torch": torch.__version__, "cuda": torch.version.cuda,
}))
"""


def fill(command, values):
    return [part.format(**values) for part in command]


def environment(path=None):
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), env["PATH"], *TOOLS))
    env["PYTHONUNBUFFERED"] = "1"
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return env


def missing_files(command):
    """The parts of a command that name a file of this tree which is not there."""
    relative = [part for part in command if re.fullmatch(r"[\w./-]+\.py", part)]
    return [part for part in relative if not (ROOT / part).is_file()]


def dry_run(work=WORK):
    """Prints the plan and checks what can be checked without a GPU. Returns what is wrong."""
    work.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("PYTHONPATH") or ROOT / "python"
    values = _values(work, gpu_build.find_bench(), _recipes(path))
    problems, filled, total = [], set(), 0
    for step in gpu_plan.PLAN:
        total += step.seconds
        print(f"\n{step.name}: {step.seconds} s, {step.proves}")
        print(f"  {' '.join(fill(step.command, values | {'bench_cuda': gpu_build.BENCH}))}")
        if step.targets:
            print(f"  fills {', '.join(step.targets)}")
        wrong = [f"{name} is missing" for name in missing_files(step.command)]
        if step.tool and not shutil.which(step.tool, path=environment()["PATH"]):
            print(f"  {step.tool} is not on this machine: here it would be skipped")
        elif step.dry and step.dry[0] == "{bench_cuda}" and not values["bench_cuda"]:
            print("  the C++ bench is not built here (`make cuda` builds it)")
        elif step.dry and not wrong:
            output, problem = _try(fill(step.dry, values), environment(path))
            wrong += [problem] if problem else []
            listed = _listed_targets(output)
            filled |= listed
            wrong += [f"no row for the target {key}" for key in step.targets if key not in listed]
        for one in wrong:
            print(f"  WRONG: {one}")
        problems += [f"{step.name}: {one}" for one in wrong]
    print(f"\n{total} s at most")
    if total > gpu_plan.SECONDS:
        problems.append(f"the plan takes {total} s, more than {gpu_plan.SECONDS}")
    problems += [f"no row fills the target {key}" for key in targets.TARGETS if key not in filled]
    return problems


def _values(work, bench, recipes):
    known = [name for name in gpu_plan.RECIPES if name in recipes]
    return {
        "python": sys.executable,
        "work": str(work),
        "bench_cuda": str(bench or ""),
        "recipes": ",".join(known),
    }


def _recipes(path):
    try:
        return gpu_build.ask(path)["recipes"]
    except gpu_build.BuildError as error:
        sys.exit(f"gpu-report: there must be a build to walk the plan with; {error}")


def _try(command, env):
    """(output, problem) of a command that should pass."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"`{' '.join(command)}`: {error}"
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return done.stdout, f"`{' '.join(command)}` gave {done.returncode}: {''.join(last)}"
    return done.stdout, None


def _listed_targets(output):
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return {json.loads(line)["target"] for line in lines if '"target"' in line}


def ask_gpu():
    """Torch's description of the GPU. Exits, with nothing written, if there is no suitable one."""
    command = [sys.executable, "-c", ASK_GPU]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        sys.exit(f"gpu-report: this machine has no GPU to report on: {said}. Nothing was written.")
    gpu = json.loads(done.stdout)
    if gpu["capability"] != [9, 0]:
        major, minor = gpu["capability"]
        sys.exit(
            f"gpu-report: {gpu['name']} has compute capability {major}.{minor}; the report is for "
            "Hopper (9.0). Nothing was written."
        )
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        gpu["driver"] = subprocess.check_output(query, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        gpu["driver"] = None
    return gpu


def execute(command, env, log, seconds):
    """Runs a step with its output in `log`; (status, note). The whole group ends with it."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "timed out", f"stopped after {seconds:.0f} s"
    if status == 0:
        return "passed", None
    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    return "failed", f"status {status}: {last}"


def why_skipped(step, results, command, env):
    for name in step.needs:
        if results[name]["status"] != "passed":
            return f"{name} {results[name]['status']}"
    if "{bench_cuda}" in step.command and "" in command:
        return "the build has no C++ bench"
    if step.tool and not shutil.which(step.tool, path=env["PATH"]):
        return f"{step.tool} is not on this machine"
    return None


def run_plan(plan, work, run=execute, now=time.monotonic):
    """Runs all steps. Returns ({name: result}, what the build says of itself)."""
    results, build, deadline = {}, None, now()
    for step in plan:
        deadline += step.seconds
        env = environment(build and build["path"])
        values = _values(work, build and build["bench_cuda"], build["recipes"] if build else [])
        command = fill(step.command, values)
        result = {"proves": step.proves, "budget_s": step.seconds, "command": " ".join(command)}
        reason = why_skipped(step, results, command, env)
        left = deadline - now()
        if reason is None and left < 1:
            reason = "no time was left"
        if reason is not None:
            result |= {"status": "skipped", "reason": reason}
        else:
            print(f"{step.name} ({left:.0f} s) ... ", end="", flush=True)
            start = now()
            with clocks.Sampler() as sampler:
                status, note = run(command, env, work / f"{step.name}.log", left)
            result |= {"status": status, "seconds": round(now() - start, 1)}
            result |= {"reason": note} if note else {}
            result |= {"clocks": sampler.result} if sampler.result else {}
        print(f"{step.name}: {result['status']}" + f", {result.get('reason', '')}".rstrip(", "))
        results[step.name] = result
        if step.name == "build" and result["status"] == "passed":
            build = json.loads((work / "build.json").read_text())
    return results, build


def collect(plan, results, work):
    """The rows that the steps left; each says of which step it is. A step that left none says so in
    a row of each of its targets."""
    rows = []
    for step in plan:
        if step.rows is None:
            continue
        path = work / step.rows
        found = json.loads(path.read_text())["rows"] if path.is_file() else []
        rows += [row | {"step": step.name} for row in found]
        result = results[step.name]
        there = {row.get("target") for row in found}
        why = result.get("reason", f"{step.name} left no such row")
        rows += [
            {"name": targets.TARGETS[key].what, "baseline": targets.TARGETS[key].baseline,
             "target": key, "reason": why, "step": step.name}
            for key in step.targets if key not in there
        ]  # fmt: skip
    return rows + train_rows(work / "train" / "summary.json")


def train_rows(path):
    """Each recipe of `quaver train` against bf16, at equal batch."""
    if not path.is_file():
        return []
    recipes = json.loads(path.read_text())["recipes"]
    base = recipes.get("bf16")
    rows = []
    for name, result in recipes.items():
        row = {
            "name": f"quaver train, {name}",
            "step": "train",
            "tokens_per_s": result["tokens_per_s"],
            "peak_memory": result.get("peak_memory"),
            "final_loss": result["final_loss"],
            "val_loss": result["val_loss"],
            "steps": result["steps"],
            "skipped": result["skipped"],
        }
        if base is not None and name != "bf16":
            row |= {"baseline": "bf16", "ratio": result["tokens_per_s"] / base["tokens_per_s"]}
        rows.append(row)
    return rows


def count_tests(path):
    """{"passed", "failed", "skipped", "failures"} of a JUnit file, or None."""
    if not path.is_file():
        return None
    cases = list(ElementTree.parse(path).iter("testcase"))
    failures = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failures) - skipped
    return {"passed": passed, "failed": len(failures), "skipped": skipped, "failures": failures}


def report(gpu, plan, results, build, work, seconds):
    rows = collect(plan, results, work)
    return {
        "schema": SCHEMA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds)),
        "seconds": round(seconds),
        "gpu": gpu,
        "machine": build and build["machine"],
        "build": build and {key: build[key] for key in ("how", "info", "ops", "sources")},
        "commit": build["commit"] if build else gpu_build.commit(),
        "steps": results,
        "tests": count_tests(work / "tests.xml"),
        "targets": targets.evaluate(rows),
        "rows": rows,
    }


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="walk the steps without a GPU")
    parser.add_argument("--name", help="of the result; default: the GPU's")
    args = parser.parse_args()
    if args.dry_run:
        problems = dry_run()
        print("\n".join(["", *problems]) if problems else "\nnothing is missing")
        sys.exit(bool(problems))
    gpu = ask_gpu()
    print(f"{gpu['name']}, torch {gpu['torch']}; logs in {os.path.relpath(WORK)}")
    shutil.rmtree(WORK, ignore_errors=True)  # what an earlier report left is no result of this one
    WORK.mkdir(parents=True)
    begin = time.monotonic()
    results, build = run_plan(gpu_plan.PLAN, WORK)
    result = report(gpu, gpu_plan.PLAN, results, build, WORK, time.monotonic() - begin)
    path = table.RESULTS / f"gpu-{slug(args.name or gpu['name'])}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table.gpu_text(result))
    table.write_readme()
    print(f"wrote {os.path.relpath(path)} and bench/README.md")
    bad = [name for name, one in results.items() if one["status"] in ("failed", "timed out")]
    if bad:
        sys.exit(f"gpu-report: {', '.join(bad)} did not pass")


if __name__ == "__main__":
    main()
