"""Peak memory of work in a process of its own, against the size of its data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def peak_mib() -> float:
    """Peak resident memory of this process; what getrusage says starts from that of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def printed_numbers(code: str, *arguments: str) -> list[float]:
    """The numbers that Python code prints in a fresh process with these arguments."""
    finished = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in finished.stdout.split()]


def draw(
    file: Path, sizes: Sequence[float], lines: Mapping[str, Sequence[float]], *, title: str, size_label: str
) -> None:
    """MiB against size: a line for the peak, one for the imports alone, one for the data themselves, by label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    styles = (("o-", "tab:blue"), ("s--", "grey"), (":", "tab:red"))
    for (label, mib), (style, color) in zip(lines.items(), styles, strict=True):
        axes.plot(sizes, mib, style, color=color, label=label)
    axes.set(xlabel=size_label, ylabel="MiB", title=title, ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
