"""Prints bench/results/*.json as the markdown table of bench/README.md."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def rows():
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        commit = result["machine"]["commit"]
        for row in result["rows"]:
            if "ratio" in row:
                yield row, commit


def main():
    print("| what | baseline | ratio | quartiles | bar | commit |\n|---|---|---|---|---|---|")
    for row, commit in rows():
        bar = row.get("bar")
        verdict = "-" if bar is None else f"{bar:g}: {'met' if row['met'] else '**missed**'}"
        low, high = row["iqr"]
        print(
            f"| {row['name']} | {row['baseline']} | {row['ratio']:.2f} x | {low:.2f} - {high:.2f} "
            f"| {verdict} | `{commit}` |"
        )


if __name__ == "__main__":
    main()
