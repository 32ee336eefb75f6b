// What is asked of NCCL, on a library that only writes it down: counts and addresses beyond 2³¹, types, empty blocks.

import assert from "node:assert/strict";
import type { DType } from "../../tensor/dtype.ts";
import type { CollectiveRequest, OperationName, Region } from "../transport.ts";
import { enqueue, enqueueMessages, type Place } from "./operations.ts";

const STREAM = 77n, COMM = 5n;

function place(rank: number, size: number): { place: Place; calls: unknown[][] } {
  const calls: unknown[][] = [];
  const library = new Proxy({}, {
    get: (_, name) => (...values: unknown[]) => {
      calls.push([name, ...values]);
      return 0;
    },
  });
  const stream = { handle: STREAM };
  const nccl = { calls: library, connecting: {}, path: "", version: "" };
  const all = { nccl, comm: COMM, rank, size, stream, scratch: 1n };
  return { place: all as unknown as Place, calls };
}

const region = (length: number, dtype: DType = "f32"): Region => ({
  dtype,
  length,
  array: null,
  address: 0,
});

function request(operation: OperationName, parts: Partial<CollectiveRequest>): CollectiveRequest {
  return {
    operation,
    sequence: 0,
    send: null,
    recv: null,
    sendCounts: [],
    recvCounts: [],
    op: "sum",
    peer: 0,
    tag: 0,
    ...parts,
  };
}

Deno.test("counts and addresses beyond 2³¹ reach NCCL as they are", () => {
  const n = 3 * 2 ** 31;
  const { place: here, calls } = place(1, 3);
  enqueue(here, request("allReduce", { send: region(n), recv: region(n), op: "max" }), 8n, 9n);
  assert.deepEqual(calls, [["ncclAllReduce", 8n, 9n, BigInt(n), 7, 2, COMM, STREAM]]);
  calls.length = 0;
  const all = request("allGather", { send: region(n, "i16"), recv: region(3 * n, "i16") });
  enqueue(here, all, 8n, 9n);
  assert.deepEqual(calls, [["ncclAllGather", 8n, 9n, BigInt(2 * n), 1, COMM, STREAM]]);
  calls.length = 0;
  const sendCounts = [n, 0, 5], recvCounts = [2, 0, n];
  const parts = {
    send: region(n + 5, "bf16"),
    recv: region(n + 2, "bf16"),
    sendCounts,
    recvCounts,
  };
  enqueue(here, request("allToAllV", parts), 1000n, 2000n);
  assert.deepEqual(calls, [
    ["ncclGroupStart"],
    ["ncclSend", 1000n, BigInt(n), 9, 0, COMM, STREAM],
    ["ncclRecv", 2000n, 2n, 9, 0, COMM, STREAM],
    ["ncclSend", 1000n + BigInt(2 * n), 5n, 9, 2, COMM, STREAM],
    ["ncclRecv", 2004n, BigInt(n), 9, 2, COMM, STREAM],
    ["ncclGroupEnd"],
  ]);
});

Deno.test("a small own block is a message, too", () => {
  const { place: here, calls } = place(1, 2);
  const counts = { sendCounts: [1, 2], recvCounts: [3, 2] };
  const parts = { send: region(3), recv: region(5), ...counts };
  enqueue(here, request("allToAllV", parts), 1000n, 2000n);
  assert.deepEqual(calls, [
    ["ncclGroupStart"],
    ["ncclSend", 1000n, 1n, 7, 0, COMM, STREAM],
    ["ncclRecv", 2000n, 3n, 7, 0, COMM, STREAM],
    ["ncclSend", 1004n, 2n, 7, 1, COMM, STREAM],
    ["ncclRecv", 2012n, 2n, 7, 1, COMM, STREAM],
    ["ncclGroupEnd"],
  ]);
});

Deno.test("nothing is asked for where no rank has anything to give", () => {
  for (const operation of ["allReduce", "allGather", "broadcast", "reduce", "allToAll"] as const) {
    const { place: here, calls } = place(0, 2);
    enqueue(here, request(operation, { send: region(0), recv: region(0) }), 0n, 0n);
    assert.deepEqual(calls, []);
  }
  const { place: here, calls } = place(0, 2);
  const counts = { sendCounts: [0, 0], recvCounts: [0, 0] };
  enqueue(here, request("allToAllV", { send: region(0), recv: region(0), ...counts }), 0n, 0n);
  assert.deepEqual(calls, []);
});

Deno.test("a group is closed when a call in it fails", () => {
  const { place: here, calls } = place(0, 2);
  const message = { receive: false, peer: 1, dtype: "f32", length: 1, address: 0n } as const;
  const broken = new Error("no");
  const failing = Object.assign(Object.create(here.nccl.calls), {
    ncclGroupStart: () => 0,
    ncclGroupEnd: () => void calls.push(["ncclGroupEnd"]),
    ncclSend: () => {
      throw broken;
    },
  });
  const there = { ...here, nccl: { ...here.nccl, calls: failing } };
  assert.throws(() => enqueueMessages(there, [message]), broken);
  assert.deepEqual(calls, [["ncclGroupEnd"]]);
});
