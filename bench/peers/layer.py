"""PyTorch's side of bench/layer.ts: a dropless Mixture-of-Experts layer, and the experts' grouped products alone.

A process that stays: it reads requests from stdin, a JSON object per line, and answers each with one, so that both sides take turns and
every shape is compiled once. Requests:

  {"do": "prepare", "shape": NAME, sizes}                 makes the layer, eager and compiled, and compiles it
  {"do": "inputs", "shape": NAME, "x": FILE, "gate": FILE}  takes the inputs that bench/layer.ts has written, so that both sides route alike
  {"do": "memory", "side": SIDE}                          peak bytes of forward and backward
  {"do": "time", "side": SIDE, "what": WHAT, "repeats": N, "warm_ms": MS}  ms of each run
  {"do": "release", "shape": NAME}

Sides of the layer, for "fwd" and "fwd_bwd": torch-eager, torch-compiled, and tutel and deepspeed where they are installed. Ways of a product (up, down,
d_hidden, d_rows, d_up, d_down; "d_up f32" and "d_down f32" write f32 gradients, the others bf16): grouped_mm, cublas_loop.
"""

import json
import math
import sys
import time

import torch
import torch.nn.functional as F


class Layer(torch.nn.Module):
    """Gate in f32, top-k of the softmax, rows sorted by expert, grouped products, weighted sum."""

    def __init__(self, experts, width, hidden, choices):
        super().__init__()
        self.choices = choices
        self.gate = torch.nn.Parameter(torch.randn(experts, width, device="cuda") * 0.02)
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


def optional_sides(sizes):
    """Tutel's and DeepSpeed's layers, where they are installed; they bring routers of their own."""
    width, hidden, experts, choices = (sizes[name] for name in ("width", "hidden", "experts", "choices"))
    found = {}
    try:
        from tutel import moe as tutel_moe

        found["tutel"] = tutel_moe.moe_layer(
            gate_type={"type": "top", "k": choices, "capacity_factor": 0},
            model_dim=width,
            experts={"type": "ffn", "num_experts_per_device": experts, "hidden_size_per_expert": hidden,
                     "activation_fn": lambda h: F.gelu(h, approximate="tanh")},
        ).cuda().bfloat16()
    except ImportError:
        pass
    try:
        from deepspeed.moe.layer import MoE

        class Expert(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.up = torch.nn.Linear(width, hidden, bias=False)
                self.down = torch.nn.Linear(hidden, width, bias=False)

            def forward(self, rows):
                return self.down(F.gelu(self.up(rows), approximate="tanh"))

        moe = MoE(width, Expert(), num_experts=experts, k=choices, drop_tokens=False).cuda().bfloat16()
        wrapped = type("First", (torch.nn.Module,), {"forward": lambda self, rows: self.moe(rows)[0]})()
        wrapped.moe = moe
        found["deepspeed"] = wrapped
    except ImportError:
        pass
    return found


def products(counts, width, hidden):
    """The experts' six products alone on rows that are sorted already: {product: {way: function}}."""
    experts, total = len(counts), sum(counts)
    rand = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    x, h = rand(total, width), rand(total, hidden)
    up, down = rand(experts, hidden, width), rand(experts, width, hidden)
    x2, h2, up2, down2 = (torch.empty_like(t) for t in (x, h, up, down))
    up4, down4 = (torch.empty_like(t, dtype=torch.float32) for t in (up, down))
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    starts = [0]
    for n in counts:
        starts.append(starts[-1] + n)
    gm, f32 = torch._grouped_mm, torch.float32

    def loop(a, b, out, mode):
        for e in range(experts):
            s, t = starts[e], starts[e + 1]
            if mode == "weight":
                torch.mm(a[s:t].t(), b[s:t], out=out[e])
            elif mode == "weight f32":
                torch.mm(a[s:t].t(), b[s:t], out_dtype=f32, out=out[e])
            elif t > s:
                torch.mm(a[s:t], b[e].t() if mode == "forward" else b[e], out=out[s:t])

    return {
        "up": (lambda: gm(x, up.transpose(-2, -1), offs=ends), lambda: loop(x, up, h2, "forward")),
        "down": (lambda: gm(h, down.transpose(-2, -1), offs=ends), lambda: loop(h, down, x2, "forward")),
        "d_hidden": (lambda: gm(x, down, offs=ends), lambda: loop(x, down, h2, "back")),
        "d_rows": (lambda: gm(h, up, offs=ends), lambda: loop(h, up, x2, "back")),
        "d_up": (lambda: gm(h.t(), x, offs=ends), lambda: loop(h, x, up2, "weight")),
        "d_down": (lambda: gm(x.t(), h, offs=ends), lambda: loop(x, h, down2, "weight")),
        "d_up f32": (lambda: gm(h.t(), x, offs=ends, out_dtype=f32), lambda: loop(h, x, up4, "weight f32")),
        "d_down f32": (lambda: gm(x.t(), h, offs=ends, out_dtype=f32), lambda: loop(x, h, down4, "weight f32")),
    }


class Shape:
    """A layer in all its forms."""

    def __init__(self, tokens, width, hidden, experts, choices):
        self.sizes = dict(tokens=tokens, width=width, hidden=hidden, experts=experts, choices=choices)
        layer = Layer(experts, width, hidden, choices)
        # Of these sizes only, as they are alike in all runs; another shape is compiled anew.
        self.gate, compiled = layer.gate, torch.compile(layer, dynamic=False)
        self.modules = {"torch-eager": layer, "torch-compiled": compiled, **optional_sides(self.sizes)}
        self.x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
        self.d_out = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        self.products = {}
        for what in ("fwd", "fwd_bwd"):
            self.work("torch-compiled", what)()
        torch.cuda.synchronize()

    def inputs(self, x, gate):
        tokens, width, experts = self.sizes["tokens"], self.sizes["width"], self.sizes["experts"]
        read = lambda path, dtype, *shape: torch.from_file(
            path, size=shape[0] * shape[1], dtype=dtype).reshape(shape).cuda()
        with torch.no_grad():
            self.x.copy_(read(x, torch.bfloat16, tokens, width))
            self.gate.copy_(read(gate, torch.float32, experts, width))
            chosen = torch.topk(F.linear(self.x.float(), self.gate), self.sizes["choices"], dim=-1).indices
        counts = torch.bincount(chosen.flatten(), minlength=experts).tolist()
        self.products.clear()
        self.products = products(counts, width, self.sizes["hidden"])
        return counts

    def work(self, side, what):
        """A function that runs it once."""
        if what in self.products:
            return self.products[what][0 if side == "grouped_mm" else 1]
        module = self.modules[side]

        def forward():
            with torch.no_grad():
                return module(self.x)

        def both():
            self.clear(module)
            module(self.x).backward(self.d_out)

        return forward if what == "fwd" else both

    def clear(self, module):
        self.x.grad = None
        for p in module.parameters():
            p.grad = None

    def peak_bytes(self, side):
        """Weights, inputs, gradients and all that a forward and backward pass holds."""
        module = self.modules[side]
        for each in self.modules.values():
            self.clear(each)
        own = sum(t.numel() * t.element_size() for t in (self.x, self.d_out, *module.parameters()))
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.work(side, "fwd_bwd")()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base + own


def times(function, repeats, warm_ms, flush):
    """ms of each run on the GPU, with the L2 cache flushed before it, behind so much of the same work that the clock is that of a long run."""
    function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    for _ in range(math.ceil(warm_ms / 1e3 / (time.perf_counter() - began))):
        function()
    # All runs are enqueued one after another, as in a training loop: the GPU does not wait for the host between them.
    runs = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        runs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in runs]


def main():
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 64)
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    shapes, current = {}, None
    for line in sys.stdin:
        request = json.loads(line)
        do, name = request.pop("do"), request.pop("shape", None)
        try:
            if do == "prepare":
                began = time.perf_counter()
                shapes[name] = Shape(**request)
                answer = {"torch": torch.__version__, "seconds": time.perf_counter() - began}
            elif do == "inputs":
                current = shapes[name]
                answer = {"counts": current.inputs(**request), "sides": list(current.modules)}
            elif do == "memory":
                answer = {"peak_bytes": current.peak_bytes(request["side"])}
            elif do == "time":
                work = current.work(request["side"], request["what"])
                answer = {"times": times(work, request["repeats"], request["warm_ms"], flush)}
            else:
                current = None
                del shapes[name]
                torch.cuda.empty_cache()
                answer = {}
        except Exception as error:  # the other side goes on without this
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
