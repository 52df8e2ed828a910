"""Data parallelism: averaged gradients (ddp.py), and states spread over ranks (zero.py)."""
