// send and recv: one channel per ordered pair of ranks, with room for a few fragments. A message is cut into fragments; a sender is
// done when its last fragment is in the channel, a receiver when it has taken it out. Messages of one tag stay in order; one that
// nobody has asked for yet is set aside when a receiver of another tag waits behind it.

import { bytesOf, DTYPES } from "../../tensor/dtype.ts";
import { linearBuffer } from "../../tensor/cpu/memory.ts";
import type { CollectiveRequest } from "../transport.ts";
import { UserBytes } from "./copy.ts";
import { CHANNEL_DEPTH, type Segment } from "./segment.ts";

const LINE = 64;
// Words of a fragment's header; the size is in two words, because it may exceed 32 bits.
const F_TAG = 0, F_DTYPE = 1, F_LOW = 2, F_HIGH = 3;

/** The channels of one rank of a segment. */
export class Channels {
  readonly #segment: Segment;
  readonly #incoming: Incoming[] = [];
  readonly #outgoing: SendOperation[][] = [];

  /** @param segment Where the channels are. */
  constructor(segment: Segment) {
    this.#segment = segment;
    for (let q = 0; q < segment.size; q++) {
      this.#incoming.push(new Incoming(segment, q));
      this.#outgoing.push([]);
    }
  }

  /** Starts a send. @param request What. @returns The operation. */
  send(request: CollectiveRequest): PairOperation {
    const queue = this.#outgoing[request.peer];
    const operation = new SendOperation(this.#segment, request, queue);
    queue.push(operation);
    return operation;
  }

  /** Starts a receive. @param request What. @returns The operation. */
  recv(request: CollectiveRequest): PairOperation {
    return this.#incoming[request.peer].expect(request);
  }
}

/** A send or receive on its way. */
export interface PairOperation {
  /** Moves on as far as it goes. @returns Whether it is complete. */
  poll(): boolean;
}

/** Byte offset of the channel from one rank to another. */
function channelAt({ base, layout, size }: Segment, from: number, to: number): number {
  return base + layout.channels + (from * size + to) * layout.channelStride;
}

function fragmentAt(segment: Segment, channel: number, count: number): number {
  return channel + 2 * LINE + (count & (CHANNEL_DEPTH - 1)) * (LINE + segment.layout.fragment);
}

class SendOperation implements PairOperation {
  readonly #segment: Segment;
  readonly #request: CollectiveRequest;
  readonly #queue: SendOperation[];
  readonly #channel: number;
  readonly #data: UserBytes;
  readonly #bytes: number;
  #sent = 0;
  #started = false;

  constructor(segment: Segment, request: CollectiveRequest, queue: SendOperation[]) {
    this.#segment = segment;
    this.#request = request;
    this.#queue = queue;
    this.#channel = channelAt(segment, segment.rank, request.peer);
    this.#data = new UserBytes(request.send!);
    this.#bytes = request.send!.length * bytesOf(request.send!.dtype);
  }

  poll(): boolean {
    if (this.#queue[0] !== this) return false;
    const { words, layout } = this.#segment;
    const written = this.#channel / 4, read = (this.#channel + LINE) / 4;
    while (!this.#started || this.#sent < this.#bytes) {
      const count = words[written];
      if (((count - Atomics.load(words, read)) | 0) >= CHANNEL_DEPTH) return false;
      const at = fragmentAt(this.#segment, this.#channel, count);
      const bytes = Math.min(layout.fragment, this.#bytes - this.#sent);
      words[at / 4 + F_TAG] = this.#request.tag;
      words[at / 4 + F_DTYPE] = DTYPES.indexOf(this.#request.send!.dtype);
      words[at / 4 + F_LOW] = this.#bytes | 0;
      words[at / 4 + F_HIGH] = Math.floor(this.#bytes / 0x100000000);
      this.#data.copyOut(this.#sent, at + LINE, bytes);
      this.#sent += bytes;
      this.#started = true;
      Atomics.store(words, written, (count + 1) | 0);
      this.#segment.wake(this.#request.peer);
    }
    this.#queue.shift();
    return true;
  }
}

/** Where the fragments of the message at the head of a channel go. */
interface Message {
  readonly tag: number;
  readonly dtype: number;
  readonly bytes: number;
  taken: number;
  /** Set aside here, if no receiver was there for it. */
  aside: Uint8Array<ArrayBuffer> | null;
  receiver: RecvOperation | null;
}

/** What comes from one rank. */
class Incoming {
  readonly #segment: Segment;
  readonly #from: number;
  readonly #channel: number;
  readonly #receivers: RecvOperation[] = []; // not done yet, in the order of their calls
  readonly #aside: Message[] = []; // complete messages that nobody has asked for
  #head: Message | null = null;

  constructor(segment: Segment, from: number) {
    this.#segment = segment;
    this.#from = from;
    this.#channel = channelAt(segment, from, segment.rank);
  }

  expect(request: CollectiveRequest): RecvOperation {
    const receiver = new RecvOperation(this, request);
    const i = this.#aside.findIndex((m) => m.tag === request.tag);
    if (i >= 0) {
      const [message] = this.#aside.splice(i, 1);
      receiver.fillWith(message, this.#from);
      receiver.done = true;
    } else {
      this.#receivers.push(receiver);
    }
    return receiver;
  }

  /** Takes fragments out of the channel as long as there are some and somebody waits. */
  progress(): void {
    const { words, layout } = this.#segment;
    const written = this.#channel / 4, read = (this.#channel + LINE) / 4;
    while (this.#receivers.length > 0) {
      const count = words[read];
      if (Atomics.load(words, written) === count) return;
      const at = fragmentAt(this.#segment, this.#channel, count);
      const message = this.#head ??= this.#begin(at / 4);
      const bytes = Math.min(layout.fragment, message.bytes - message.taken);
      message.receiver?.take(message.taken, at + LINE, bytes);
      message.aside?.set(new Uint8Array(linearBuffer(), at + LINE, bytes), message.taken);
      message.taken += bytes;
      Atomics.store(words, read, (count + 1) | 0);
      this.#segment.wake(this.#from);
      if (message.taken < message.bytes) continue;
      this.#head = null;
      this.#finish(message);
    }
  }

  #begin(at: number): Message {
    const { words } = this.#segment;
    const bytes = (words[at + F_LOW] >>> 0) + words[at + F_HIGH] * 0x100000000;
    const tag = words[at + F_TAG];
    const i = this.#receivers.findIndex((r) => r.tag === tag);
    const message: Message = {
      tag,
      dtype: words[at + F_DTYPE],
      bytes,
      taken: 0,
      aside: null,
      receiver: null,
    };
    if (i < 0) {
      message.aside = new Uint8Array(bytes);
    } else {
      message.receiver = this.#receivers[i];
      message.receiver.match(message, this.#from);
    }
    return message;
  }

  #finish(message: Message): void {
    // A message that began before its receiver was there may have one by now.
    const receiver = message.receiver ?? this.#receivers.find((r) => r.tag === message.tag);
    if (receiver === undefined) {
      this.#aside.push(message);
      return;
    }
    if (message.aside !== null) receiver.fillWith(message, this.#from);
    receiver.done = true;
    this.#receivers.splice(this.#receivers.indexOf(receiver), 1);
  }
}

class RecvOperation implements PairOperation {
  readonly tag: number;
  done = false;
  readonly #incoming: Incoming;
  readonly #request: CollectiveRequest;
  readonly #data: UserBytes;

  constructor(incoming: Incoming, request: CollectiveRequest) {
    this.#incoming = incoming;
    this.#request = request;
    this.tag = request.tag;
    this.#data = new UserBytes(request.recv!);
  }

  poll(): boolean {
    if (this.done) return true;
    this.#incoming.progress();
    return this.done;
  }

  match(message: Message, from: number): void {
    const { dtype, length } = this.#request.recv!;
    if (message.dtype === DTYPES.indexOf(dtype) && message.bytes === length * bytesOf(dtype)) {
      return;
    }
    const sent = DTYPES[message.dtype];
    throw new RangeError(
      `the message of rank ${from} with tag ${this.tag} must have ${length} elements of ${dtype}: current value is ${
        message.bytes / bytesOf(sent)
      } of ${sent}`,
    );
  }

  take(offset: number, from: number, bytes: number): void {
    this.#data.copyIn(offset, from, bytes);
  }

  /** Takes a whole message that was set aside. */
  fillWith(message: Message, from: number): void {
    this.match(message, from);
    this.#data.fill(0, message.aside!);
  }
}
