"""In which memory format a convolution is faster on this CPU: behind the choice in dtrades_fast/models/layout.py.

    python bench/bench_layout.py
    ONEDNN_MAX_CPU_ISA=AVX2 python bench/bench_layout.py --dtype bfloat16

Milliseconds of a 3x3 convolution, contiguous / channels last: forward, gradient to its input, gradient to its weight.
Both formats take turns; reported is the median.
"""

from __future__ import annotations

from harness import Effort, measure, pinned  # isort: skip  # first: see harness.py

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from steps import at_least

from dtrades_fast.environment import cpu_model

#: Channels and pixels per side, as in ResNet-18 and VGG-16 at width 64, 32 and 16.
SHAPES = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2), (256, 4), (256, 2), (128, 4), (128, 2), (64, 4), (16, 32))
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
FILE_WIDTH = 120
WANTED = {"forward": None, "input": (True, False, False), "weight": (False, True, False)}


def row(channels: int, side: int, batch: int, dtype: torch.dtype) -> list[str]:
    """A line of the table."""
    tensors = {}
    for name, memory in FORMATS.items():
        shapes = (batch, channels, side, side), (channels, channels, 3, 3), (batch, channels, side, side)
        tensors[name] = [torch.rand(shape).to(dtype).contiguous(memory_format=memory) for shape in shapes]
    cells = []
    for mask in WANTED.values():
        calls = {}
        for name, (x, weight, gradient) in tensors.items():
            if mask is None:
                calls[name] = lambda x=x, w=weight: F.conv2d(x, w, padding=1)
            else:
                calls[name] = lambda x=x, w=weight, g=gradient, mask=mask: torch.ops.aten.convolution_backward(
                    g, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
                )
        took = measure(calls, torch.device("cpu"), Effort(seconds=0.2, rounds=5))
        first, second = (took[name].median_us / 1e3 for name in FORMATS)
        cells.append(f"{first:.2f} / {second:.2f} ({first / second:.2f})")
    return [f"{channels}, {side}x{side}", *cells]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    table = Table(title=f"{cpu_model()}: ms contiguous / channels last (ratio), {options.batch_size} images")
    for name in ("channels, pixels", *WANTED):
        table.add_column(name)
    with pinned(options.threads):
        for channels, side in SHAPES:
            table.add_row(*row(channels, side, options.batch_size, getattr(torch, options.dtype)))
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
