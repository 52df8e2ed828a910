"""The parallelism of a run, parsed from --parallel into frozen data."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError

__all__ = ["Parallel"]

KINDS = ("dp", "zero", "fsdp", "tp")


@dataclass(frozen=True)
class Parallel:
    """`data` groups of `tensor` ranks: a group shares the model by tensor parallelism, the groups
    share each micro-batch by `kind`: "dp" (data parallelism), "zero" (with optimizer states spread,
    stage 2) or "fsdp" (with everything sharded, FSDP2)."""

    kind: str = "dp"
    data: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str | Parallel | None) -> Parallel:
        """Parses `--parallel`: "dp=4", "zero=4", "fsdp=4", "tp=2", or one of the first two with the
        last, "dp=2,tp=2" for four ranks. None is one process. Raises UsageError naming the part
        that is wrong."""
        if text is None or isinstance(text, Parallel):
            return text or cls()
        found = {}
        for part in text.split(","):
            kind, equals, count = part.partition("=")
            number = count.isascii() and count.isdecimal() and len(count) < 10
            if kind not in KINDS or not equals or not number or int(count) < 1:
                raise UsageError(
                    f"--parallel wants dp=N, zero=N, fsdp=N or tp=N, N at least 1, got {part!r}"
                )
            found[kind] = int(count)
        apart = [kind for kind in found if kind != "tp"]  # only one, and FSDP2 goes alone
        alone = "fsdp" in found and "tp" in found
        if len(apart) > 1 or alone or len(text.split(",")) != len(found):
            raise UsageError(
                f"--parallel takes fsdp=N, or one of dp=N and zero=N, and tp=N, got {text!r}"
            )
        kind = apart[0] if apart else "dp"
        return cls(kind, found.get(kind, 1), found.get("tp", 1))

    @property
    def ranks(self) -> int:
        return self.data * self.tensor

    def __str__(self) -> str:
        parts = [f"{self.kind}={self.data}"] if self.data > 1 or self.kind != "dp" else []
        return ",".join(parts + [f"tp={self.tensor}"] * (self.tensor > 1)) or "dp=1"
