# One rank of bench/nccl.ts: torch.distributed over NCCL, with the operations, turns and streams of bench/_nccl_rank.ts. Each operation
# is ordered after the current stream and before it again, as torch does unless told otherwise; times are those of events on that
# stream. Arguments: a Unix socket, a name for this side, bytes of the largest operation. `op bytes iterations` over the socket is
# answered by `time_us host_us`. Between its turns it sleeps.

import os
import socket
import sys
import time

import torch
import torch.distributed as dist

WARM_BYTES = 1 << 20

path, side, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.cuda.set_device(0)
dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
rank, size = dist.get_rank(), dist.get_world_size()
x = torch.ones(most // 4, device="cuda")
y = torch.empty(most // 4, device="cuda")
token = torch.ones(1, device="cuda")
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


def measure(operation, nbytes, iterations):
    """One turn: everything is enqueued at once, and the host sleeps until it is done."""
    warm = operation(min(nbytes, WARM_BYTES) // 4)
    run = operation(nbytes // 4)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(max(2, iterations // 2)):
        warm()
    dist.all_reduce(token)  # the devices begin together
    begin.record()
    start = time.perf_counter()
    for _ in range(iterations):
        run()
    host_us = (time.perf_counter() - start) * 1e6
    end.record()
    while not end.query():
        time.sleep(0.001)
    return begin.elapsed_time(end) * 1e3 / iterations, host_us / iterations


def library():
    """The name of the file of the NCCL that this process has loaded."""
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps if "libnccl.so" in line}
    return os.path.basename(min(files)) if files else "?"


dist.all_reduce(token)
torch.cuda.synchronize()
version = ".".join(str(n) for n in torch.cuda.nccl.version())
connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
lines = connection.makefile("rw")
print(f"{side} {rank} torch {torch.__version__}, NCCL {version}, {library()}", file=lines, flush=True)
for line in lines:
    name, nbytes, iterations = line.split()
    time_us, host_us = measure(OPERATIONS[name], int(nbytes), int(iterations))
    print(f"{time_us:.2f} {host_us:.3f}", file=lines, flush=True)
dist.destroy_process_group()
