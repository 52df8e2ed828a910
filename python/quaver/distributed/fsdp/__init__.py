"""FSDP2 with FP8 on the wire (fsdp.py). Imported when it is used: torch takes a second for it."""
