// A rank's end of the store (`store_server.ts`): sends requests, matches replies, and hears which ranks have left the job.
// An idle connection does not keep the process alive.

import type { Store } from "../transport.ts";
import {
  decodeReply,
  encodeRequest,
  FrameReader,
  type Hello,
  Operation,
  Status,
  writeAll,
} from "./protocol.ts";

/** Time to wait for a key when the caller gives none, in milliseconds. */
export const DEFAULT_TIMEOUT_MS = 60_000;
const RETRY_MS = 20;
const REPLY_GRACE_MS = 10_000;
/** The longest time that setTimeout takes. */
const LONGEST_MS = 2 ** 31 - 1;

/** Options of {@linkcode connectStore}. */
export interface ConnectOptions {
  /** Where the store listens. */
  readonly hostname: string;
  /** Where the store listens. */
  readonly port: number;
  /** The job's token. */
  readonly token: string;
  /** Who connects. */
  readonly hello: Hello;
  /** Longest time until the store answers, and to wait for a key that says no other, in milliseconds. @default {60000} */
  readonly timeout_ms?: number;
  /** Called when a rank (or node) has left, with how. */
  readonly onLeft?: (number: number, how: string) => void;
  /** Called when the store itself has gone, unless this client has closed. */
  readonly onLost?: () => void;
}

interface Pending {
  readonly what: string;
  resolve(value: Uint8Array): void;
  reject(error: Error): void;
}

/**
 * Connects to a store, trying until it listens.
 *
 * @param options Where, who, and the token.
 * @returns The connected store.
 * @throws {Error} If nothing answers in time, something else answers, the token is another job's, or the rank is connected already.
 */
export async function connectStore(options: ConnectOptions): Promise<StoreClient> {
  const { hostname, port } = options;
  const timeout_ms = options.timeout_ms ?? DEFAULT_TIMEOUT_MS;
  const until = performance.now() + timeout_ms;
  const place = `${hostname}:${port}`;
  let conn: Deno.TcpConn;
  for (;;) {
    try {
      const signal = AbortSignal.timeout(
        Math.max(0, Math.min(until - performance.now(), LONGEST_MS)),
      );
      conn = await Deno.connect({ hostname, port, signal });
      break;
    } catch (cause) {
      if (performance.now() >= until) {
        throw new Error(
          `Cannot join the job as its rendezvous must listen at ${place} within ${timeout_ms} ms: current value is unreachable`,
          { cause },
        );
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
  conn.setNoDelay(true);
  const reader = new FrameReader(conn);
  const value = new TextEncoder().encode(JSON.stringify(options.hello));
  const request = { operation: Operation.hello, id: 0, key: options.token, value };
  const left_ms = Math.min(Math.max(1000, until - performance.now()), LONGEST_MS);
  const late = setTimeout(() => conn.close(), left_ms);
  let reply: ReturnType<typeof decodeReply> = null;
  try {
    await writeAll(conn, encodeRequest(request));
    const body = await reader.next();
    reply = body && decodeReply(body);
  } catch {
    // reset, or not our protocol: as no reply
  }
  clearTimeout(late);
  if (reply?.status === Status.ok) return new StoreClient(conn, reader, options);
  try {
    conn.close();
  } catch {
    // closed by the time-out
  }
  if (reply?.status !== Status.refused) {
    throw new Error(
      `Cannot join the job as its rendezvous must listen at ${place}: current value is a program that does not answer as one`,
    );
  }
  const why = new TextDecoder().decode(reply.value);
  throw new Error(
    why === "token"
      ? `Cannot join the job at ${place} as LINA_TOKEN must be the token of that job: current value is ${
        options.token === "" ? "unset" : "another"
      }; perhaps another job uses this port`
      : `Cannot join the job at ${place} as ${options.hello.kind} ${options.hello.number} of ${options.hello.size} must be new to it: current value is: ${why}; perhaps another job uses this port`,
  );
}

/** A connection to a store. */
export class StoreClient implements Store {
  #conn: Deno.TcpConn;
  #place: string;
  #timeout_ms: number;
  #pending = new Map<number, Pending>();
  #next = 1;
  #sending: Promise<void> = Promise.resolve();
  #gone: Error | undefined;
  #closing = false;

  /**
   * Use {@linkcode connectStore}.
   *
   * @param conn A connection that has been welcomed.
   * @param reader Its frames.
   * @param options Who is told of departures.
   */
  constructor(conn: Deno.TcpConn, reader: FrameReader, options: ConnectOptions) {
    this.#conn = conn;
    this.#place = `${options.hostname}:${options.port}`;
    this.#timeout_ms = options.timeout_ms ?? DEFAULT_TIMEOUT_MS;
    void this.#listen(reader, options);
    conn.unref();
  }

  /** Sets a key; anyone waiting for it wakes up. @param key The key. @param value The value; at most 1 MiB. */
  async set(key: string, value: Uint8Array): Promise<void> {
    await this.#ask(Operation.set, key, value);
  }

  /**
   * The value of a key, waiting for it to be set.
   *
   * @param key The key.
   * @param timeout_ms Longest wait in milliseconds. @default {that of the connection}
   * @returns The value.
   * @throws {Error} After the time-out, naming the key and the ranks that are not connected.
   */
  async get(key: string, timeout_ms: number = this.#timeout_ms): Promise<Uint8Array> {
    const operand = new Uint8Array(Float64Array.of(timeout_ms).buffer);
    const late = Promise.withResolvers<never>();
    // The store keeps the time; this only helps when it has stopped answering.
    const timer = setTimeout(() => {
      late.reject(
        new Error(
          `Cannot get "${key}" as the rendezvous at ${this.#place} must answer: current value is silence`,
        ),
      );
    }, Math.min(timeout_ms + REPLY_GRACE_MS, LONGEST_MS));
    try {
      return await Promise.race([this.#ask(Operation.get, key, operand), late.promise]);
    } finally {
      clearTimeout(timer);
    }
  }

  /**
   * Adds to a counter.
   *
   * @param key The counter, 0 at first.
   * @param delta What to add.
   * @returns The new value.
   */
  async add(key: string, delta: number): Promise<number> {
    const sum = await this.#ask(Operation.add, key, new Uint8Array(Float64Array.of(delta).buffer));
    return new DataView(sum.buffer, sum.byteOffset, 8).getFloat64(0, true);
  }

  /** Leaves the job and ends the connection. */
  async close(): Promise<void> {
    if (this.#closing) return;
    this.#closing = true;
    if (this.#gone) return;
    const bye = encodeRequest({
      operation: Operation.bye,
      id: 0,
      key: "",
      value: new Uint8Array(),
    });
    try {
      await (this.#sending = this.#sending.then(() => writeAll(this.#conn, bye)));
    } catch {
      // the store has gone first
    }
    this.#end(new Error("Cannot use the store as it must be open: current value is closed"));
  }

  #ask(operation: number, key: string, value: Uint8Array): Promise<Uint8Array> {
    if (this.#gone) return Promise.reject(this.#gone);
    const id = this.#next++ >>> 0;
    const frame = encodeRequest({ operation, id, key, value });
    const { promise, resolve, reject } = Promise.withResolvers<Uint8Array>();
    const what = `${
      operation === Operation.get ? "get" : operation === Operation.set ? "set" : "add to"
    } "${key}"`;
    this.#pending.set(id, { what, resolve, reject });
    if (this.#pending.size === 1) this.#conn.ref();
    this.#sending = this.#sending.then(() => writeAll(this.#conn, frame)).catch(() => {
      // the reading side notices and rejects what is pending
    });
    return promise;
  }

  async #listen(reader: FrameReader, options: ConnectOptions): Promise<void> {
    try {
      for (;;) {
        const body = await reader.next();
        const reply = body && decodeReply(body);
        if (!reply) break;
        if (reply.status === Status.left) {
          options.onLeft?.(reply.id, new TextDecoder().decode(reply.value));
          continue;
        }
        const pending = this.#pending.get(reply.id);
        if (!pending) continue;
        this.#pending.delete(reply.id);
        if (this.#pending.size === 0) this.#conn.unref();
        if (reply.status === Status.ok) pending.resolve(reply.value);
        else {
          const why = new TextDecoder().decode(reply.value);
          pending.reject(new Error(`Cannot ${pending.what} in the rendezvous as ${why}`));
        }
      }
    } catch {
      // reset: as the end
    }
    this.#end(
      new Error(
        `Cannot use the rendezvous at ${this.#place} as the process that serves it must run: current value is ended`,
      ),
    );
    if (!this.#closing) options.onLost?.();
  }

  #end(error: Error): void {
    this.#gone ??= error;
    for (const pending of this.#pending.values()) pending.reject(this.#gone);
    this.#pending.clear();
    try {
      this.#conn.close();
    } catch {
      // closed already
    }
  }
}
