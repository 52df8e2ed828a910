"""The closing table of `quaver tune`."""

from __future__ import annotations

from ..progress import MIB, grid, number

__all__ = ["table"]

LEGEND = """\
trains: parameters. held-out: loss over the answers' tokens of examples that were
not trained on; train: of the last 5 % of the steps. state MiB: weights, gradients
and optimizer states; saved MiB: activations kept for backward; x less: the
bytes of both against the first method's. peak MiB: the most that the GPU held."""


def _row(name: str, result: dict, first: dict, untouched: float | None) -> dict[str, str]:
    memory, loss, peak = result["memory"], result["val_loss"], result["peak_memory"]
    known = None not in (loss, untouched)
    return {
        "method": name,
        "trains": f"{result['trained']:,}",
        "held-out": number(loss),
        "change": f"{(loss / untouched - 1) * 100:+.2f} %" if known else "-",
        "train": number(result["final_loss"]),
        "tokens/s": f"{result['tokens_per_s']:,.0f}",
        "x": f"{result['tokens_per_s'] / first['tokens_per_s']:.2f}",
        "state MiB": f"{(memory['total'] - memory['activation']) / MIB:.1f}",
        "saved MiB": f"{memory['activation'] / MIB:.1f}",
        "x less": f"{first['memory']['total'] / memory['total']:.2f}",
        "peak MiB": "-" if peak is None else f"{peak / MIB:.1f}",
        "skipped": str(result["skipped"]),
    }


def table(results: dict[str, dict], untouched: float | None) -> str:
    """The results of several methods ({name: result}) and the held-out loss of the model as it was,
    as lines of text."""
    first = next(iter(results.values()))
    rows = [_row(name, result, first, untouched) for name, result in results.items()]
    head = {key: key for key in rows[0]} | {"change": "vs untouched"}
    if first["peak_memory"] is None:
        del head["peak MiB"]
    if not any(result["skipped"] for result in results.values()):
        del head["skipped"]
    base = dict.fromkeys(head, "-") | {"method": "untouched", "held-out": number(untouched)}
    return f"{grid(head, [base, *rows])}\n\n{LEGEND}"
