"""PyTorch's side of bench/layer.ts: one dropless Mixture-of-Experts layer, forward and backward.

Two forms of the layer are timed: eager and compiled. `gemm-only` times just the six grouped products of the experts, on rows that
are sorted already, by the faster of torch._grouped_mm and a loop of cuBLAS products. Reads inputs that bench/layer.ts has written, so that both
sides route alike; prints one JSON line per side. Optional sides (tutel, deepspeed) run where they are installed.
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F

FLUSH = None


def timed(function, repeats):
    """Median ms of a function on the GPU, with the L2 cache flushed before each run."""
    global FLUSH
    if FLUSH is None:
        FLUSH = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    # All runs are enqueued one after another, as in a training loop: the GPU does not wait for the host between them.
    runs = []
    for _ in range(repeats):
        FLUSH.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        runs.append((start, end))
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in runs]
    return statistics.median(times)


class Layer(torch.nn.Module):
    """Gate in f32, top-k of the softmax, rows sorted by expert, grouped products, weighted sum."""

    def __init__(self, experts, width, hidden, choices, gate):
        super().__init__()
        self.choices = choices
        self.gate = torch.nn.Parameter(gate)
        self.up = torch.nn.Parameter(torch.randn(experts, hidden, width, device="cuda", dtype=torch.bfloat16) * 0.02)
        self.down = torch.nn.Parameter(torch.randn(experts, width, hidden, device="cuda", dtype=torch.bfloat16) * 0.02)

    def forward(self, x):
        tokens, width = x.shape
        logits = F.linear(x.float(), self.gate)
        weights, chosen = torch.topk(torch.softmax(logits, dim=-1), self.choices, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        flat = chosen.flatten()
        order = torch.argsort(flat, stable=True)
        ends = torch.bincount(flat, minlength=self.gate.shape[0]).cumsum(0).to(torch.int32)
        source = order // self.choices
        rows = x[source]
        hidden = F.gelu(torch._grouped_mm(rows, self.up.transpose(-2, -1), offs=ends), approximate="tanh")
        y = torch._grouped_mm(hidden, self.down.transpose(-2, -1), offs=ends)
        y = y * weights.flatten()[order].unsqueeze(-1).to(y.dtype)
        return torch.zeros_like(x).index_add_(0, source, y)


def layer_side(name, layer, x, d_out, repeats):
    def forward():
        with torch.no_grad():
            return layer(x)

    def both():
        x.grad = None
        for p in layer.parameters():
            p.grad = None
        layer(x).backward(d_out)

    torch.cuda.reset_peak_memory_stats()
    result = {"side": name, "fwd_ms": timed(forward, repeats), "fwd_bwd_ms": timed(both, repeats)}
    result["peak_bytes"] = torch.cuda.max_memory_allocated() - (FLUSH.numel() if FLUSH is not None else 0)
    return result


def gemm_only(counts, width, hidden, repeats):
    """The experts' six products alone, by the faster path for each."""
    experts, total = len(counts), sum(counts)
    rand = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    x, h = rand(total, width), rand(total, hidden)
    up, down = rand(experts, hidden, width), rand(experts, width, hidden)
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    starts = [0]
    for n in counts:
        starts.append(starts[-1] + n)
    gm = torch._grouped_mm

    def loop(a, b, out, mode):
        for e in range(experts):
            s, t = starts[e], starts[e + 1]
            if mode == "weight":
                torch.mm(a[s:t].t(), b[s:t], out=out[e])
            elif t > s:
                torch.mm(a[s:t], b[e].t() if mode == "forward" else b[e], out=out[s:t])

    products = {
        "up": (lambda: gm(x, up.transpose(-2, -1), offs=ends), lambda: loop(x, up, h2, "forward")),
        "down": (lambda: gm(h, down.transpose(-2, -1), offs=ends), lambda: loop(h, down, x2, "forward")),
        "d_hidden": (lambda: gm(x, down, offs=ends), lambda: loop(x, down, h2, "back")),
        "d_rows": (lambda: gm(h, up, offs=ends), lambda: loop(h, up, x2, "back")),
        "d_up": (lambda: gm(h.t(), x, offs=ends), lambda: loop(h, x, up2, "weight")),
        "d_down": (lambda: gm(x.t(), h, offs=ends), lambda: loop(x, h, down2, "weight")),
    }
    x2, h2, up2, down2 = (torch.empty_like(t) for t in (x, h, up, down))
    best, detail = {}, {}
    for name, (grouped, looped) in products.items():
        times = []
        for run in (grouped, looped):
            try:
                times.append(timed(run, repeats))
            except RuntimeError:
                times.append(float("inf"))
        best[name] = min(times)
        detail[name] = {"grouped_mm_ms": times[0], "cublas_loop_ms": times[1]}
    forward = best["up"] + best["down"]
    return {"side": "gemm-only", "fwd_ms": forward, "fwd_bwd_ms": sum(best.values()), "detail": detail}


def optional_sides(args, gate, x, d_out):
    """Tutel and DeepSpeed, where they are installed; their layers bring routers of their own."""
    try:
        from tutel import moe as tutel_moe

        layer = tutel_moe.moe_layer(
            gate_type={"type": "top", "k": args.choices, "capacity_factor": 0},
            model_dim=args.width,
            experts={"type": "ffn", "num_experts_per_device": args.experts, "hidden_size_per_expert": args.hidden,
                     "activation_fn": lambda h: F.gelu(h, approximate="tanh")},
        ).cuda().bfloat16()
        yield layer_side("tutel", layer, x, d_out, args.repeats)
    except ImportError:
        pass
    try:
        from deepspeed.moe.layer import MoE

        class Expert(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.up = torch.nn.Linear(args.width, args.hidden, bias=False)
                self.down = torch.nn.Linear(args.hidden, args.width, bias=False)

            def forward(self, rows):
                return self.down(F.gelu(self.up(rows), approximate="tanh"))

        moe = MoE(args.width, Expert(), num_experts=args.experts, k=args.choices, drop_tokens=False).cuda().bfloat16()
        wrapped = type("First", (torch.nn.Module,), {"forward": lambda self, rows: moe(rows)[0]})()
        wrapped.moe = moe
        yield layer_side("deepspeed", wrapped, x, d_out, args.repeats)
    except ImportError:
        pass


def main():
    parser = argparse.ArgumentParser()
    for name in ("tokens", "width", "hidden", "experts", "choices"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--x", required=True, help="bf16 [tokens, width], raw")
    parser.add_argument("--gate", required=True, help="f32 [experts, width], raw")
    args = parser.parse_args()
    read = lambda path, dtype, *shape: torch.from_file(
        path, size=shape[0] * shape[1], dtype=dtype).reshape(shape).cuda()
    x = read(args.x, torch.bfloat16, args.tokens, args.width).requires_grad_()
    gate = read(args.gate, torch.float32, args.experts, args.width)
    d_out = torch.randn(args.tokens, args.width, device="cuda", dtype=torch.bfloat16)
    chosen = torch.topk(F.linear(x.detach().float(), gate), args.choices, dim=-1).indices
    counts = torch.bincount(chosen.flatten(), minlength=args.experts).tolist()
    print(json.dumps({"side": "torch-routing", "counts": counts, "torch": torch.__version__}), flush=True)
    layer = Layer(args.experts, args.width, args.hidden, args.choices, gate)
    print(json.dumps(layer_side("torch-eager", layer, x, d_out, args.repeats)), flush=True)
    compiled = torch.compile(layer)
    print(json.dumps(layer_side("torch-compiled", compiled, x, d_out, args.repeats)), flush=True)
    del layer, compiled
    print(json.dumps(gemm_only(counts, args.width, args.hidden, args.repeats)), flush=True)
    for side in optional_sides(args, gate, x, d_out):
        print(json.dumps(side), flush=True)


if __name__ == "__main__":
    main()
