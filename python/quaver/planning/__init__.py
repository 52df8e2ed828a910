"""Memory of a training step before it runs: `qv.plan` and `quaver plan`."""

from .plan import Plan, plan

__all__ = ["Plan", "plan"]
