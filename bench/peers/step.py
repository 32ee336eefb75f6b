"""PyTorch's side of bench/step.ts: a training step of a decoder with Mixture-of-Experts layers, bf16 over f32 master weights.

The model is that of moe/transformer.ts: RMS norms, rotary positions, causal attention by SDPA's flash kernel, top-k routing in f32,
SwiGLU experts by torch._grouped_mm, untied head, cross-entropy, the norm clipped at 1, fused AdamW. With --weights DIR (a checkpoint of ours) and --tokens FILE (i32 [steps,
batch, sequence + 1]) it trains on given data and prints the losses, so that both sides can be compared step by step. --dtype f32 computes in f32, the
experts one after another.
"""

import argparse
import glob
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F

DTYPE = torch.bfloat16  # of what is computed; main() sets it


def grouped(x, weights, ends):
    """The product of each group of rows with its expert's matrix, [E, in, out]."""
    if DTYPE == torch.bfloat16:
        return torch._grouped_mm(x, weights, offs=ends)
    starts = [0] + ends.tolist()
    return torch.cat([x[a:b] @ w for a, b, w in zip(starts, starts[1:], weights)])


class Attention(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.size = c.heads, c.width // c.heads
        self.qkv = torch.nn.Parameter(torch.randn(3 * c.width, c.width) * 0.02)
        self.out = torch.nn.Parameter(torch.randn(c.width, c.width) * 0.02 / math.sqrt(2 * c.layers))

    def forward(self, x, cos, sin):
        b, s, d = x.shape
        q, k, v = F.linear(x, self.qkv.to(DTYPE)).view(b, s, 3, self.heads, self.size).unbind(2)
        turn = lambda t: t * cos + torch.cat((-t[..., self.size // 2:], t[..., : self.size // 2]), -1) * sin
        q, k = turn(q.float()).to(DTYPE), turn(k.float()).to(DTYPE)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return F.linear(y.transpose(1, 2).reshape(b, s, d), self.out.to(DTYPE))


class Mixture(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.choices, self.experts, self.hidden, self.aux = c.choices, c.experts, c.hidden, c.aux
        self.gate = torch.nn.Parameter(torch.randn(c.experts, c.width) * 0.02)
        self.up = torch.nn.Parameter(torch.randn(c.experts, 2 * c.hidden, c.width) * 0.02)
        self.down = torch.nn.Parameter(torch.randn(c.experts, c.width, c.hidden) * 0.02 / math.sqrt(2 * c.layers))

    def forward(self, x):
        logits = F.linear(x.float(), self.gate)
        scores = torch.softmax(logits, dim=-1)
        weights, chosen = torch.topk(scores, self.choices, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        flat = chosen.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.experts)
        ends = counts.cumsum(0).to(torch.int32)
        source = order // self.choices
        h = grouped(x[source], self.up.to(DTYPE).transpose(-2, -1), ends)
        h = F.silu(h[:, : self.hidden]) * h[:, self.hidden:]
        y = grouped(h, self.down.to(DTYPE).transpose(-2, -1), ends)
        y = y * weights.flatten()[order].unsqueeze(-1).to(DTYPE)
        out = torch.zeros_like(x).index_add_(0, source, y)
        share = counts.float() / flat.shape[0]
        return out, self.aux * self.experts * (share * scores.mean(0)).sum()


class Block(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = torch.nn.Parameter(torch.ones(c.width))
        self.norm2 = torch.nn.Parameter(torch.ones(c.width))
        self.attention, self.mixture = Attention(c), Mixture(c)

    def forward(self, x, cos, sin):
        d = x.shape[-1]
        x = x + self.attention(F.rms_norm(x, (d,), self.norm1.to(DTYPE), 1e-5), cos, sin)
        y, aux = self.mixture(F.rms_norm(x, (d,), self.norm2.to(DTYPE), 1e-5).view(-1, d))
        return x + y.view_as(x), aux


class Model(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.randn(c.vocab, c.width) * 0.02)
        self.blocks = torch.nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = torch.nn.Parameter(torch.ones(c.width))
        self.head = torch.nn.Parameter(torch.randn(c.vocab, c.width) * 0.02)
        size = c.width // c.heads
        angle = torch.outer(torch.arange(c.sequence).float(), 10000.0 ** (-torch.arange(0, size, 2).float() / size))
        self.register_buffer("cos", torch.cat((angle, angle), -1).cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", torch.cat((angle, angle), -1).sin()[None, :, None, :], persistent=False)

    def forward(self, tokens, targets):
        x = F.embedding(tokens, self.embedding).to(DTYPE)
        auxiliary = 0.0
        for block in self.blocks:
            x, aux = block(x, self.cos, self.sin)
            auxiliary = auxiliary + aux
        x = F.rms_norm(x, (x.shape[-1],), self.norm.to(DTYPE), 1e-5)
        logits = F.linear(x, self.head.to(DTYPE)).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1)), auxiliary


def load(model, directory, c):
    """Takes the weights of a checkpoint of ours: Mixtral's names."""
    from safetensors import safe_open

    found = {}
    for path in glob.glob(f"{directory}/*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if not any(part in name for part in (".moment", ".residual")):
                    found[name] = file.get_tensor(name).float()
    put = lambda parameter, value: parameter.data.copy_(value)
    put(model.embedding, found["model.embed_tokens.weight"])
    put(model.norm, found["model.norm.weight"])
    put(model.head, found["lm_head.weight"])
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        put(block.norm1, found[at + "input_layernorm.weight"])
        put(block.norm2, found[at + "post_attention_layernorm.weight"])
        put(block.attention.qkv, torch.cat([found[f"{at}self_attn.{p}_proj.weight"] for p in "qkv"]))
        put(block.attention.out, found[at + "self_attn.o_proj.weight"])
        moe = at + "block_sparse_moe."
        put(block.mixture.gate, found[moe + "gate.weight"])
        for e in range(c.experts):
            ex = f"{moe}experts.{e}."
            put(block.mixture.up[e], torch.cat((found[ex + "w1.weight"], found[ex + "w3.weight"])))
            put(block.mixture.down[e], found[ex + "w2.weight"])


def main():
    parser = argparse.ArgumentParser()
    sizes = dict(layers=12, width=1024, heads=16, hidden=2816, experts=16, choices=2, sequence=1024, batch=16, vocab=32000)
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--aux", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--mode", choices=("eager", "compiled"), default="compiled")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for given data only")
    parser.add_argument("--weights")
    parser.add_argument("--tokens")
    c = parser.parse_args()
    global DTYPE
    DTYPE = torch.bfloat16 if c.dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    with torch.device(c.device):
        model = Model(c)
    if c.weights:
        load(model, c.weights, c)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=c.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    run = torch.compile(model) if c.mode == "compiled" else model
    given = None
    if c.tokens:
        count = c.steps * c.batch * (c.sequence + 1)
        given = torch.from_file(c.tokens, size=count, dtype=torch.int32).view(c.steps, c.batch, c.sequence + 1).long().to(c.device)
    random = torch.randint(c.vocab, (c.batch, c.sequence + 1), device=c.device)

    def step(i):
        rows = given[i] if given is not None else random
        for group in optimizer.param_groups:
            group["lr"] = c.lr * min(1.0, (i + 1) / c.warmup) if c.warmup else c.lr
        loss, auxiliary = run(rows[:, :-1], rows[:, 1:])
        (loss + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    if given is not None:
        for i in range(c.steps):
            print(json.dumps({"step": i + 1, "loss": step(i).item()}), flush=True)
        return
    began = time.time()
    for i in range(5):
        step(i)
    torch.cuda.synchronize()
    warm_s = time.time() - began
    torch.cuda.reset_peak_memory_stats()
    times = []
    for i in range(c.steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        loss = step(i)
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    step_ms = statistics.median(a.elapsed_time(b) for a, b in times)
    print(json.dumps({
        "side": f"torch-{c.mode}", "step_ms": step_ms, "tokens_per_s": c.batch * c.sequence / step_ms * 1e3,
        "peak_bytes": torch.cuda.max_memory_allocated(), "loss": loss.item(), "warm_s": warm_s, "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }), flush=True)


if __name__ == "__main__":
    main()
