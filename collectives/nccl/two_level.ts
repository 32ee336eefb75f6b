// An all-to-all on two levels on a GPU: everything is enqueued at the call and ordered by events, and the host waits for nothing. Inside
// the host, what other hosts get goes first; then messages between hosts and the rest inside the host are on their way at once. What ranks gather
// lies in two pieces of memory that are used in turn, so that the halves of two exchanges may overlap.

import { CUDART } from "../../ffi/cudart.ts";
import type { CudaDevice } from "../../tensor/cuda/device.ts";
import type { CudaEvent, CudaStream } from "../../tensor/cuda/streams.ts";
import type { Device, Stream } from "../../tensor/device.ts";
import { bytesOf, type DType } from "../../tensor/dtype.ts";
import { Tensor } from "../../tensor/tensor.ts";
import { recorder } from "../../trace/mod.ts";
import { PendingWork } from "../progress.ts";
import type { Completion } from "../transport.ts";
import { type Levels, type Part, settled, startMessages } from "../two_level_flight.ts";
import type { ExchangePlan, OwnBlock } from "../two_level_plan.ts";
import type { OperationOptions, Work } from "../types.ts";
import { copy } from "./staging.ts";

/** Exchanges whose gathered elements may be in memory at once. */
const PIECES = 2;
/** Smallest piece in bytes. */
const SMALLEST_BYTES = 1 << 16;

/** Device memory for what ranks gather. */
interface Piece {
  readonly address: number;
  readonly bytes: number;
  /** The messages that sent its contents on, if it was used. */
  last: Work | undefined;
}

/**
 * Exchanges of the data of GPUs.
 *
 * @param levels The communicators.
 * @returns What makes them for the rank's device.
 */
export function deviceExchanges(levels: Levels): (device: Device) => DeviceExchanges {
  return (device) => new DeviceExchanges(levels, device as CudaDevice);
}

/** Starts the exchanges of one rank's device. */
export class DeviceExchanges implements AsyncDisposable {
  readonly #levels: Levels;
  readonly #device: CudaDevice;
  /** Between the halves: what this rank gathers from itself, and the point at which the second half may begin. */
  readonly #relay: CudaStream;
  /** What the second half does not wait for, and the end. */
  readonly #tail: CudaStream;
  readonly #pieces: Piece[] = [];
  #outgrown: Piece[] = [];
  #next = 0;

  /** @param levels The communicators. @param device The rank's GPU. */
  constructor(levels: Levels, device: CudaDevice) {
    this.#levels = levels;
    this.#device = device;
    this.#relay = device.createStream(`${levels.outer.name} relay`);
    this.#tail = device.createStream(`${levels.outer.name} end`);
  }

  /**
   * Enqueues an exchange.
   *
   * @param plan This rank's part of it.
   * @param send What the rank gives.
   * @param recv What it gets.
   * @param options What it is ordered after.
   * @returns Its completion.
   */
  start(
    plan: ExchangePlan,
    send: Tensor,
    recv: Tensor,
    options: OperationOptions | undefined,
  ): DeviceExchange {
    const { inner, outer } = this.#levels;
    const { dtype } = send;
    const relay = this.#relay;
    const after = options?.after ?? this.#device.stream.record();
    const piece = plan.gathered > 0 ? this.#take(plan.gathered * bytesOf(dtype)) : undefined;
    relay.wait(after);
    piece?.last?.wait(relay);
    const timed = recorder.capturing || recorder.timed;
    const ready = timed ? relay.recordTimed() : relay.record();

    const from = partsOf(send), to = partsOf(recv);
    const gathered = piece === undefined ? to : partsOf(
      // The piece's memory is nobody's tensor: this one, like all views, frees nothing.
      new Tensor(this.#device, dtype, [plan.gathered], { address: piece.address, owner: recv }),
    );
    const first = startMessages(inner, {
      from,
      sends: plan.gatherSends,
      to: gathered,
      receives: plan.gatherReceives,
    }, { after: ready });
    // Messages that are started one after another are one group, which begins and ends as one: the last stands for all.
    void first.at(-1)?.wait(relay);
    for (const own of plan.gatherOwn) copyOwn(relay, send.address, piece!.address, own, dtype);
    const middle = relay.record();

    const tail = this.#tail;
    tail.wait(after);
    if (plan.homeOwn !== null) copyOwn(tail, send.address, recv.address, plan.homeOwn, dtype);
    const rest = startMessages(inner, {
      from,
      sends: plan.homeSends,
      to,
      receives: plan.homeReceives,
    }, { after });
    void rest.at(-1)?.wait(tail);
    const second = startMessages(outer, {
      from: gathered,
      sends: plan.hostSends,
      to,
      receives: plan.hostReceives,
    }, { after: middle });
    const last = second.at(-1);
    if (last === undefined) tail.wait(middle);
    else void last.wait(tail);
    if (piece !== undefined) piece.last = last;
    const end = timed ? tail.recordTimed() : tail.record();
    const lasts = [rest.at(-1) ?? first.at(-1), last].filter((work) => work !== undefined);
    const messages = [...first, ...rest, ...second];
    return new DeviceExchange(messages, lasts, tail, timed ? ready : null, end);
  }

  /** The piece whose turn it is, which what was sent from it before may still be read from. */
  #take(bytes: number): Piece {
    this.#outgrown = this.#outgrown.filter((piece) => {
      if (piece.last !== undefined && !settled(piece.last)) return true;
      this.#device.free(piece.address);
      return false;
    });
    const i = this.#next;
    this.#next = (i + 1) % PIECES;
    if (this.#pieces[i]?.bytes >= bytes) return this.#pieces[i];
    let size = SMALLEST_BYTES;
    while (size < bytes) size *= 2;
    const address = this.#device.allocate(size);
    this.#relay.wait(this.#device.stream.record()); // memory is handed out in the order of that stream
    if (this.#pieces[i] !== undefined) this.#outgrown.push(this.#pieces[i]);
    return this.#pieces[i] = { address, bytes: size, last: undefined };
  }

  /** Frees its memory and streams, once its communicators are closed. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#relay.synchronize();
    await this.#tail.synchronize();
    for (const { address } of [...this.#pieces, ...this.#outgrown]) this.#device.free(address);
    this.#pieces.length = this.#outgrown.length = 0;
    this.#relay.destroy();
    this.#tail.destroy();
  }
}

/** One exchange of a GPU's data. */
export class DeviceExchange implements Completion {
  #messages: Work[];
  readonly #lasts: readonly Work[];
  readonly #tail: CudaStream;
  readonly #begin: CudaEvent | null;
  /** Where it ends. */
  readonly end: CudaEvent;

  /**
   * @param messages Its messages.
   * @param lasts The last of them on each level.
   * @param tail Where it ends.
   * @param begin When it began, if that is timed.
   * @param end When it has ended.
   */
  constructor(
    messages: Work[],
    lasts: readonly Work[],
    tail: CudaStream,
    begin: CudaEvent | null,
    end: CudaEvent,
  ) {
    this.#messages = messages;
    this.#lasts = lasts;
    this.#tail = tail;
    this.#begin = begin;
    this.end = end;
  }

  poll(): boolean {
    if (this.#messages.length > 0) {
      this.#messages = this.#messages.filter((work) => !settled(work));
      if (this.#messages.length > 0) return false;
    }
    this.#begin?.done(); // takes its time by the same tie of the clocks as the end's
    return this.end.done();
  }

  idle(spins: number): void {
    const { waiting } = this;
    if (waiting instanceof PendingWork) waiting.idle(spins);
  }

  /** A message that it waits for. */
  get waiting(): Work | undefined {
    return this.#messages[0];
  }

  /** Orders a stream after the exchange. @throws {Error} If a level has failed: there is no result to come. */
  waitOn(stream: Stream): void {
    this.#check(stream);
    stream.wait(this.end);
  }

  /** A point that the host can wait for, behind the exchange. @throws {Error} If a level has failed. */
  mark(): CudaEvent {
    this.#check(this.#tail);
    return this.#tail.mark();
  }

  /** A level that has failed says so to whoever waits for its messages. */
  #check(stream: Stream): void {
    for (const last of this.#lasts) void last.wait(stream);
  }

  get span(): (() => readonly [number, number]) | undefined {
    const begin = this.#begin, { end } = this;
    return begin === null ? undefined : () => [begin.time(), end.time()];
  }
}

/** Parts of a tensor; they share its memory. */
function partsOf(tensor: Tensor): Part {
  const { device, dtype, address } = tensor;
  const width = bytesOf(dtype);
  return (at, length) =>
    new Tensor(device, dtype, [length], { address: address + at * width, owner: tensor });
}

function copyOwn(
  stream: CudaStream,
  source: number,
  target: number,
  { from, to, length }: OwnBlock,
  dtype: DType,
): void {
  const width = bytesOf(dtype);
  copy(stream, target + to * width, source + from * width, length * width, CUDART.deviceToDevice);
}
