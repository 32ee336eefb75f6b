# One rank of bench/nccl.ts: torch.distributed over NCCL, with the operations, sizes, repeats and streams of bench/_nccl_rank.ts. Each
# operation is ordered after the current stream and before it again, as torch does unless told otherwise; times are those of events on that
# stream. Arguments as there. Rank 0 prints `op bytes time_us host_us`.

import os
import sys
import time

import torch
import torch.distributed as dist

samples = int(sys.argv[1])
until_ms = float(sys.argv[2])
sizes = [tuple(int(n) for n in text.split(":")) for text in sys.argv[3:]]
torch.cuda.set_device(0)
dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
rank, size = dist.get_rank(), dist.get_world_size()
most = max(nbytes for nbytes, _ in sizes)
x = torch.ones(most // 4, device="cuda")
y = torch.empty(most // 4, device="cuda")
following, previous = (rank + 1) % size, (rank + size - 1) % size


def all_reduce(n):
    a = x[:n]
    return lambda: dist.all_reduce(a)


def reduce_scatter(n):
    a, out = x[:n], y[: n // size]
    return lambda: dist.reduce_scatter_tensor(out, a)


def all_gather(n):
    a, out = x[: n // size], y[:n]
    return lambda: dist.all_gather_into_tensor(out, a)


def broadcast(n):
    a = x[:n]
    return lambda: dist.broadcast(a, 0)


def reduce(n):
    a = x[:n]
    return lambda: dist.reduce(a, 0)


def gather(n):
    a = x[: n // size]
    out = list(y[:n].chunk(size)) if rank == 0 else None
    return lambda: dist.gather(a, out, 0)


def scatter(n):
    a = list(x[:n].chunk(size)) if rank == 0 else None
    out = y[: n // size]
    return lambda: dist.scatter(out, a, 0)


def all_to_all(n):
    a, out = x[:n], y[:n]
    return lambda: dist.all_to_all_single(out, a)


def all_to_all_v(n):
    unit = n // (3 * size)
    counts = [unit * (1 + (rank + r) % 3) for r in range(size)]
    a, out = x[: sum(counts)], y[: sum(counts)]
    return lambda: dist.all_to_all_single(out, a, counts, counts)


def send_recv(n):
    a, out = x[:n], y[:n]

    def run():
        pair = [dist.P2POp(dist.isend, a, following), dist.P2POp(dist.irecv, out, previous)]
        for work in dist.batch_isend_irecv(pair):
            work.wait()

    return run


OPERATIONS = {
    "allReduce": all_reduce,
    "reduceScatter": reduce_scatter,
    "allGather": all_gather,
    "broadcast": broadcast,
    "reduce": reduce,
    "gather": gather,
    "scatter": scatter,
    "allToAll": all_to_all,
    "allToAllV": all_to_all_v,
    "sendRecv": send_recv,
}


def measure(run, iterations):
    for _ in range(max(1, iterations >> 1)):
        run()
    torch.cuda.synchronize()
    times, hosts = [], []
    for _ in range(2 if iterations < 4 else samples):
        dist.barrier()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        start = time.perf_counter()
        for _ in range(iterations):
            run()
        host_us = (time.perf_counter() - start) * 1e6
        end.record()
        torch.cuda.synchronize()
        both = torch.tensor([begin.elapsed_time(end) * 1e3, host_us], dtype=torch.float64, device="cuda")
        dist.all_reduce(both, dist.ReduceOp.MAX)
        device_us, host_us = both.tolist()
        times.append(device_us / iterations)
        hosts.append(host_us / iterations)
    return sorted(times)[len(times) // 2], sorted(hosts)[len(hosts) // 2]


def goes_on():
    """Whether there is time to begin something; all ranks agree."""
    late = torch.tensor([float(time.time() * 1e3 >= until_ms)], device="cuda")
    dist.all_reduce(late, dist.ReduceOp.MAX)
    return late.item() == 0


def measure_all():
    for nbytes, iterations in sizes:
        for name, operation in OPERATIONS.items():
            if not goes_on():
                return
            time_us, host_us = measure(operation(nbytes // 4), iterations)
            if rank == 0:
                print(f"{name} {nbytes} {time_us:.2f} {host_us:.3f}", flush=True)


for _ in range(5):
    if not goes_on():
        break
    for operation in OPERATIONS.values():
        measure(operation(sizes[0][0] // 4), 40)
measure_all()
if rank == 0:
    version = ".".join(str(n) for n in torch.cuda.nccl.version())
    print(f"# torch {torch.__version__}, NCCL {version}", file=sys.stderr)
dist.destroy_process_group()
