"""PyTorch's side of bench/gpu_grouped.ts: torch._grouped_mm on the same groups, one JSON line per product."""

import argparse
import json
import statistics

import torch


def timed(function, repeats, flush):
    """Median ms of a function on the GPU, with the L2 cache flushed before each run."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", help="JSON list of {name, counts, from, to}")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    for case in json.loads(options.cases):
        counts, width_in, width_out = case["counts"], case["from"], case["to"]
        rows, device = sum(counts), "cuda"
        ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
        x = torch.randn(rows, width_in, device=device, dtype=torch.bfloat16)
        dy = torch.randn(rows, width_out, device=device, dtype=torch.bfloat16)
        w = torch.randn(len(counts), width_out, width_in, device=device, dtype=torch.bfloat16)
        products = {
            "forward": lambda: torch._grouped_mm(x, w.transpose(-2, -1), offs=ends),
            "input grad": lambda: torch._grouped_mm(dy, w, offs=ends),
            "weight grad": lambda: torch._grouped_mm(dy.t(), x, offs=ends),
        }
        for product, function in products.items():
            time_ms = timed(function, options.repeats, flush)
            tflops = 2e-9 * rows * width_in * width_out / time_ms
            line = {"side": "torch", "case": case["name"], "product": product, "tflops": tflops}
            print(json.dumps(line), flush=True)
        del x, dy, w


main()
