"""Clocks, power and temperature of the GPU while something is measured, by nvidia-smi."""

import re
import subprocess
import tempfile
from statistics import median

FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "temperature.gpu": "temperature_c",
}
BUSY = "utilization.gpu"
REASONS = "clocks_event_reasons.active"  # a bit mask: why the clock is not higher
PERIOD_MS = 200


def parse(text):
    """Minimum, median and maximum of each field while the GPU was busy, and every set of reasons
    seen then, from nvidia-smi's lines. A field that the machine does not offer is left out."""
    lines = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    lines = [parts for parts in lines if len(parts) == len(FIELDS) + 2 and parts[-2] != "0"]
    result = {}
    for i, name in enumerate(FIELDS.values()):
        values = [float(parts[i]) for parts in lines if re.fullmatch(r"[\d.]+", parts[i])]
        if values:
            result[name] = {"min": min(values), "median": median(values), "max": max(values)}
    if lines:
        result["reasons"] = sorted({parts[-1] for parts in lines})
    return result


class Sampler:
    """with Sampler() as sampler: ...; then sampler.result, empty where there is no nvidia-smi."""

    def __enter__(self):
        self.result = {}
        self.file = tempfile.TemporaryFile("w+")
        query = ",".join((*FIELDS, BUSY, REASONS))
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        try:
            self.process = subprocess.Popen(
                [*command, "--id=0", f"--loop-ms={PERIOD_MS}"],
                stdout=self.file,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            self.process = None
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.file.seek(0)
            self.result = parse(self.file.read())
        self.file.close()
