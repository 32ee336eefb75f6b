// The transport of a world of one: every operation is a copy, done when the call returns. It needs no native code and no
// shared memory, so a script runs without launcher and without FFI.

import type { TypedArray } from "../tensor/dtype.ts";
import type { CollectiveRequest, Completion, Region, Transport } from "./transport.ts";

const DONE: Completion = { poll: () => true, idle: () => {} };

/** A message to oneself that has been sent and not yet received. */
interface Message {
  readonly tag: number;
  readonly data: TypedArray;
}

/** A receive that waits for a message from oneself. */
interface Receiver {
  readonly tag: number;
  readonly into: TypedArray;
  done: boolean;
}

/**
 * Opens the transport of a world of one.
 *
 * @returns The transport; nothing needs to be closed.
 */
export function openSelf(): Transport {
  const messages: Message[] = [];
  const receivers: Receiver[] = [];

  function start(request: CollectiveRequest): Completion {
    const { operation, send, recv } = request;
    if (operation === "send") deliver(request.tag, hostOf(send));
    else if (operation === "recv") return receive(request.tag, hostOf(recv));
    else if (send !== null && recv !== null && send !== recv) copy(hostOf(send), hostOf(recv));
    return DONE;
  }

  function deliver(tag: number, data: TypedArray): void {
    const i = receivers.findIndex((r) => r.tag === tag);
    if (i < 0) {
      messages.push({ tag, data: data.slice() });
      return;
    }
    const [receiver] = receivers.splice(i, 1);
    match(data, receiver.into);
    receiver.done = true;
  }

  function receive(tag: number, into: TypedArray): Completion {
    const i = messages.findIndex((m) => m.tag === tag);
    if (i >= 0) {
      match(messages.splice(i, 1)[0].data, into);
      return DONE;
    }
    const receiver: Receiver = { tag, into, done: false };
    receivers.push(receiver);
    return { poll: () => receiver.done, idle: () => {} };
  }

  return {
    backend: "self",
    start,
    split: () => Promise.resolve(openSelf()),
    missing: () => [],
    close: () => Promise.resolve(),
  };
}

function hostOf(region: Region | null): TypedArray {
  const array = region?.array;
  if (!array) {
    throw new TypeError(
      "Cannot copy in a world of one as the data must be on the host: current value is device memory",
    );
  }
  return array;
}

function copy(from: TypedArray, to: TypedArray): void {
  // Both have one element type: the communicator has checked that.
  (to as Float32Array).set(from as Float32Array);
}

function match(data: TypedArray, into: TypedArray): void {
  if (data.length !== into.length || data.constructor !== into.constructor) {
    throw new RangeError(
      `Cannot receive on rank 0 from rank 0 as the message must have ${into.length} elements of ${into.constructor.name}: current value is ${data.length} of ${data.constructor.name}`,
    );
  }
  copy(data, into);
}
