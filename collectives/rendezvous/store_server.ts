// The store that ranks meet at: a small key-value server over TCP, in the launcher's process or, without a launcher, in rank 0's.
// It knows who is connected, so it can tell everybody when a rank leaves. It is not a database: values are small, live in memory
// and are gone with the job.

import {
  decodeRequest,
  encodeReply,
  FrameReader,
  type Hello,
  MAX_FRAME_BYTES,
  Operation,
  type Request,
  Status,
  writeAll,
} from "./protocol.ts";
import { rangesOf } from "./ranges.ts";

const MAX_VALUES = 100_000;
const MAX_VALUE_BYTES = 64 << 20;
/** As many as one node may start at once; they are strangers until their first message is read. */
const MAX_STRANGERS = 1024;
const MAX_BACKLOG_BYTES = 8 << 20;
const HELLO_TIMEOUT_MS = 5_000;
/** Largest frame of a stranger: a token and a few words. */
const MAX_HELLO_BYTES = 4096;
const MAX_WAIT_MS = 24 * 3600 * 1000;

/** Options of {@linkcode StoreServer.listen}. */
export interface StoreServerOptions {
  /** Address to bind. @default {"127.0.0.1"} */
  readonly hostname?: string;
  /** Port to bind; 0 takes a free one. @default {0} */
  readonly port?: number;
  /** What clients must know. Empty is allowed on loopback only. */
  readonly token: string;
  /** Most clients that are connected at once. @default {4096} */
  readonly maxClients?: number;
}

interface Client {
  readonly conn: Deno.Conn;
  hello: Hello | null;
  /** Keys of this attempt begin with it. */
  scope: string;
  said_bye: boolean;
  backlog_bytes: number;
  sending: Promise<void>;
}

interface Waiter {
  readonly client: Client;
  readonly id: number;
  readonly timer: ReturnType<typeof setTimeout>;
}

/** Whether an address is reachable from this machine only. @param hostname The address. @returns Whether it is. */
export function isLoopback(hostname: string): boolean {
  return hostname === "localhost" || hostname === "::1" || /^127(\.\d{1,3}){3}$/.test(hostname);
}

/** A running store. */
export class StoreServer {
  /** Address that it is bound to. */
  readonly hostname: string;
  /** Port that it is bound to. */
  readonly port: number;
  #listener: Deno.TcpListener;
  #token: Uint8Array;
  #maxClients: number;
  #clients = new Set<Client>();
  #members = new Map<string, Client>();
  #values = new Map<string, Uint8Array>();
  #valueBytes = 0;
  #counters = new Map<string, number>();
  #waiters = new Map<string, Set<Waiter>>();
  #closed = false;

  private constructor(listener: Deno.TcpListener, options: StoreServerOptions) {
    this.#listener = listener;
    this.hostname = listener.addr.hostname;
    this.port = listener.addr.port;
    this.#token = new TextEncoder().encode(options.token);
    this.#maxClients = options.maxClients ?? 4096;
    void this.#accept();
  }

  /**
   * Binds a port and serves it.
   *
   * @param options Where, and the token.
   * @returns The running store.
   * @throws {Error} If the port is taken, or a token is missing for an address that other machines can reach.
   */
  static listen(options: StoreServerOptions): StoreServer {
    const hostname = options.hostname ?? "127.0.0.1";
    const port = options.port ?? 0;
    if (options.token === "" && !isLoopback(hostname)) {
      throw new Error(
        `Cannot serve the rendezvous at ${hostname} as LINA_TOKEN must be set, to the same secret on every node, when other machines can reach it: current value is empty`,
      );
    }
    let listener: Deno.TcpListener;
    try {
      listener = Deno.listen({ hostname, port });
    } catch (cause) {
      if (cause instanceof Deno.errors.AddrInUse) {
        throw new Error(
          `Cannot serve the rendezvous as port ${port} of ${hostname} must be free: current value is in use, perhaps by another job; end that one or choose another port (--rdzv HOST:PORT, MASTER_PORT)`,
          { cause },
        );
      }
      if (cause instanceof Deno.errors.AddrNotAvailable) {
        throw new Error(
          `Cannot serve the rendezvous as ${hostname} must be an address of this machine, which is node 0: current value is not one`,
          { cause },
        );
      }
      throw cause;
    }
    return new StoreServer(listener, options);
  }

  /** Lets the process end although the store listens; connected clients keep it alive until they leave. */
  unref(): void {
    this.#listener.unref();
  }

  /** Closes the port and every connection. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#listener.close();
    for (const waiters of this.#waiters.values()) {
      for (const waiter of waiters) clearTimeout(waiter.timer);
    }
    this.#waiters.clear();
    for (const client of this.#clients) disconnect(client);
  }

  async #accept(): Promise<void> {
    while (!this.#closed) {
      let conn: Deno.TcpConn;
      try {
        conn = await this.#listener.accept();
      } catch {
        if (this.#closed) return;
        await new Promise((resolve) => setTimeout(resolve, 10)); // out of descriptors, or reset before it was accepted
        continue;
      }
      let strangers = 0;
      for (const client of this.#clients) if (client.hello === null) strangers++;
      if (strangers >= MAX_STRANGERS || this.#clients.size >= this.#maxClients) {
        conn.close();
        continue;
      }
      conn.setNoDelay(true);
      void this.#serve({
        conn,
        hello: null,
        scope: "",
        said_bye: false,
        backlog_bytes: 0,
        sending: Promise.resolve(),
      });
    }
  }

  async #serve(client: Client): Promise<void> {
    this.#clients.add(client);
    const late = setTimeout(() => disconnect(client), HELLO_TIMEOUT_MS);
    const reader = new FrameReader(client.conn);
    try {
      for (;;) {
        const body = await reader.next(client.hello === null ? MAX_HELLO_BYTES : MAX_FRAME_BYTES);
        const request = body && decodeRequest(body);
        if (!request) break; // the end, or malformed
        if (client.hello === null) {
          if (!this.#welcome(client, request)) break;
          clearTimeout(late);
        } else if (request.operation === Operation.bye) {
          client.said_bye = true;
          break;
        } else if (!this.#answer(client, client.hello, request)) break;
      }
    } catch {
      // reset, or a frame over the bound
    }
    clearTimeout(late);
    await client.sending;
    this.#forget(client);
  }

  /** Judges the first request. Says why to those who know the token, and nothing but "token" to those who do not. */
  #welcome(client: Client, request: Request): boolean {
    if (request.operation !== Operation.hello) return false;
    const refuse = (why: string): false => {
      this.#send(client, encodeReply(Status.refused, request.id, why));
      return false;
    };
    if (!sameBytes(new TextEncoder().encode(request.key), this.#token)) return refuse("token");
    const hello = parseHello(request.value);
    if (!hello) return refuse("hello");
    const name = memberName(hello);
    const present = this.#members.get(name);
    if (present) return refuse(`${hello.kind} ${hello.number} is connected already`);
    for (const other of this.#members.values()) {
      const known = other.hello!;
      if (known.kind === hello.kind && known.size !== hello.size) {
        return refuse(`the job has ${known.size} ${hello.kind}s, not ${hello.size}`);
      }
    }
    client.hello = hello;
    client.scope = `${hello.kind === "node" ? "node" : hello.attempt}/`;
    this.#members.set(name, client);
    this.#send(client, encodeReply(Status.ok, request.id, ""));
    return true;
  }

  /** Carries out one request. @returns Whether it was well formed. */
  #answer(client: Client, hello: Hello, request: Request): boolean {
    const { id, value } = request;
    const key = client.scope + request.key;
    switch (request.operation) {
      case Operation.set: {
        const bytes = this.#valueBytes + value.length - (this.#values.get(key)?.length ?? 0);
        if (bytes > MAX_VALUE_BYTES || this.#values.size >= MAX_VALUES) {
          const room = `${MAX_VALUES} values of ${MAX_VALUE_BYTES} bytes together`;
          const why = `the store must hold at most ${room}: current value is full`;
          this.#send(client, encodeReply(Status.error, id, why));
          return true;
        }
        this.#valueBytes = bytes;
        this.#values.set(key, value);
        this.#send(client, encodeReply(Status.ok, id, ""));
        for (const waiter of this.#waiters.get(key) ?? []) {
          clearTimeout(waiter.timer);
          this.#send(waiter.client, encodeReply(Status.ok, waiter.id, value));
        }
        this.#waiters.delete(key);
        return true;
      }
      case Operation.get: {
        if (value.length !== 8) return false;
        const known = this.#values.get(key);
        if (known) this.#send(client, encodeReply(Status.ok, id, known));
        else this.#wait(client, hello, key, id, viewOf(value).getFloat64(0, true));
        return true;
      }
      case Operation.add: {
        if (value.length !== 8) return false;
        const sum = (this.#counters.get(key) ?? 0) + viewOf(value).getFloat64(0, true);
        if (this.#counters.size < MAX_VALUES || this.#counters.has(key)) {
          this.#counters.set(key, sum);
          this.#send(
            client,
            encodeReply(Status.ok, id, new Uint8Array(Float64Array.of(sum).buffer)),
          );
        } else {this.#send(
            client,
            encodeReply(Status.error, id, "the store must have room: it is full"),
          );}
        return true;
      }
    }
    return false;
  }

  #wait(client: Client, hello: Hello, key: string, id: number, timeout_ms: number): void {
    const waiters = this.#waiters.get(key) ?? new Set<Waiter>();
    const bounded_ms = timeout_ms >= 0 ? Math.min(timeout_ms, MAX_WAIT_MS) : 0;
    const timer = setTimeout(() => {
      waiters.delete(waiter);
      if (waiters.size === 0) this.#waiters.delete(key);
      const missing = this.#missing(hello);
      const whom = missing.length > 0 ? `; not connected: ${hello.kind} ${rangesOf(missing)}` : "";
      const why = `it must be set within ${timeout_ms} ms: current value is unset${whom}`;
      this.#send(client, encodeReply(Status.error, id, why));
    }, bounded_ms);
    const waiter = { client, id, timer };
    waiters.add(waiter);
    this.#waiters.set(key, waiters);
  }

  /** Numbers of the client's kind and attempt that are not connected. */
  #missing(hello: Hello): number[] {
    const missing: number[] = [];
    for (let number = 0; number < hello.size; number++) {
      if (!this.#members.has(memberName({ ...hello, number }))) missing.push(number);
    }
    return missing;
  }

  #send(client: Client, frame: Uint8Array): void {
    client.backlog_bytes += frame.length;
    if (client.backlog_bytes > MAX_BACKLOG_BYTES) return disconnect(client); // it does not read
    client.sending = client.sending
      .then(() => writeAll(client.conn, frame))
      .then(() => void (client.backlog_bytes -= frame.length), () => disconnect(client));
  }

  /** After the end of a connection: tells the others of its kind and attempt. */
  #forget(client: Client): void {
    disconnect(client);
    this.#clients.delete(client);
    for (const [key, waiters] of this.#waiters) {
      for (const waiter of waiters) {
        if (waiter.client !== client) continue;
        clearTimeout(waiter.timer);
        waiters.delete(waiter);
      }
      if (waiters.size === 0) this.#waiters.delete(key);
    }
    const hello = client.hello;
    if (hello === null || this.#closed) return;
    this.#members.delete(memberName(hello));
    const how = client.said_bye ? "has left the job" : "has ended without leaving the job";
    for (const other of this.#members.values()) {
      if (other.hello!.kind === hello.kind && other.scope === client.scope) {
        this.#send(other, encodeReply(Status.left, hello.number, how));
      }
    }
  }
}

function disconnect(client: Client): void {
  try {
    client.conn.close();
  } catch {
    // closed already
  }
}

function memberName(hello: Hello): string {
  return `${hello.kind}/${hello.attempt}/${hello.number}`;
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
}

/** Takes the same time wherever the difference lies. */
function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  let difference = a.length ^ b.length;
  for (let i = 0; i < a.length; i++) difference |= a[i] ^ (b[i % Math.max(1, b.length)] ?? 0);
  return difference === 0;
}

function parseHello(value: Uint8Array): Hello | null {
  let hello: Hello;
  try {
    hello = JSON.parse(new TextDecoder().decode(value));
  } catch {
    return null;
  }
  const whole = (n: unknown): n is number => Number.isSafeInteger(n) && (n as number) >= 0;
  const good = (hello?.kind === "rank" || hello?.kind === "node") && whole(hello.number) &&
    whole(hello.size) && hello.number < hello.size && hello.size <= 65536 && whole(hello.attempt);
  return good ? hello : null;
}
