// The frames that a store and its clients exchange over TCP, and nothing else: no keys are kept here and no token is judged.
//
//   request   u32 length | u8 operation | u32 id     | u16 key length | key | value
//   reply     u32 length | u8 status    | u32 id     | value
//
// Little-endian; `length` counts the bytes after itself. A frame over the bound is malformed: its connection is closed, so that
// whatever else connects (a browser, a port scanner, another protocol) costs nothing.

/** Largest frame in bytes, its length field not counted. */
export const MAX_FRAME_BYTES: number = 1 << 20;
/** Largest key in bytes of UTF-8. */
export const MAX_KEY_BYTES = 1024;

/** What a client asks for. */
export const Operation = { hello: 1, set: 2, get: 3, add: 4, bye: 5 } as const;
/** What a store answers. `left` is told unasked: its id is the rank that has left, its value says how. */
export const Status = { ok: 1, error: 2, refused: 3, left: 4 } as const;

/** Who a client is, sent as JSON in the value of `hello`; its key is the token. */
export interface Hello {
  /** `rank` for a rank of the job, `node` for a launcher. */
  readonly kind: "rank" | "node";
  /** Its number, from 0. */
  readonly number: number;
  /** How many of its kind the job has. */
  readonly size: number;
  /** How many times the job was restarted; every attempt has keys of its own. */
  readonly attempt: number;
}

/** A request as the store reads it. */
export interface Request {
  /** One of {@linkcode Operation}. */
  readonly operation: number;
  /** Repeated in the reply. */
  readonly id: number;
  /** Key, or token. */
  readonly key: string;
  /** Value, or operand. */
  readonly value: Uint8Array;
}

const encoder = new TextEncoder();
const decoder = new TextDecoder();

/**
 * Writes a request.
 *
 * @param request The request.
 * @returns Its frame.
 * @throws {RangeError} If key or value are too long.
 */
export function encodeRequest(request: Request): Uint8Array<ArrayBuffer> {
  const key = encoder.encode(request.key);
  const bytes = 7 + key.length + request.value.length;
  if (key.length > MAX_KEY_BYTES) {
    throw new RangeError(
      `Cannot use the key as it must have at most ${MAX_KEY_BYTES} bytes: current value is ${key.length} bytes`,
    );
  }
  if (bytes > MAX_FRAME_BYTES) {
    throw new RangeError(
      `Cannot store a value as it must have at most ${
        MAX_FRAME_BYTES - 7 - key.length
      } bytes: current value is ${request.value.length} bytes`,
    );
  }
  const frame = new Uint8Array(4 + bytes);
  const view = new DataView(frame.buffer);
  view.setUint32(0, bytes, true);
  view.setUint8(4, request.operation);
  view.setUint32(5, request.id, true);
  view.setUint16(9, key.length, true);
  frame.set(key, 11);
  frame.set(request.value, 11 + key.length);
  return frame;
}

/**
 * Reads a request.
 *
 * @param body A frame without its length field.
 * @returns The request, or null if it is malformed.
 */
export function decodeRequest(body: Uint8Array): Request | null {
  if (body.length < 7) return null;
  const view = new DataView(body.buffer, body.byteOffset, body.length);
  const keyBytes = view.getUint16(5, true);
  if (keyBytes > MAX_KEY_BYTES || 7 + keyBytes > body.length) return null;
  return {
    operation: view.getUint8(0),
    id: view.getUint32(1, true),
    key: decoder.decode(body.subarray(7, 7 + keyBytes)),
    value: body.subarray(7 + keyBytes),
  };
}

/**
 * Writes a reply.
 *
 * @param status One of {@linkcode Status}.
 * @param id The request's id, or the rank that has left.
 * @param value Its content; text is written as UTF-8.
 * @returns Its frame.
 */
export function encodeReply(
  status: number,
  id: number,
  value: Uint8Array | string,
): Uint8Array<ArrayBuffer> {
  const content = typeof value === "string" ? encoder.encode(value) : value;
  const frame = new Uint8Array(9 + content.length);
  const view = new DataView(frame.buffer);
  view.setUint32(0, 5 + content.length, true);
  view.setUint8(4, status);
  view.setUint32(5, id, true);
  frame.set(content, 9);
  return frame;
}

/**
 * Reads a reply.
 *
 * @param body A frame without its length field.
 * @returns Status, id and content, or null if it is malformed.
 */
export function decodeReply(
  body: Uint8Array,
): { status: number; id: number; value: Uint8Array } | null {
  if (body.length < 5) return null;
  const view = new DataView(body.buffer, body.byteOffset, body.length);
  return { status: view.getUint8(0), id: view.getUint32(1, true), value: body.subarray(5) };
}

/** Cuts a connection's bytes into frames. */
export class FrameReader {
  #conn: Deno.Conn;
  #buffer = new Uint8Array(4096);
  #filled = 0;

  /**
   * Reads frames of a connection.
   *
   * @param conn The connection.
   */
  constructor(conn: Deno.Conn) {
    this.#conn = conn;
  }

  /**
   * The next frame.
   *
   * @param most Its largest size in bytes. @default {MAX_FRAME_BYTES}
   * @returns Its bytes without the length field, a copy; null at the end of the connection.
   * @throws {RangeError} If the frame is longer.
   */
  async next(most: number = MAX_FRAME_BYTES): Promise<Uint8Array | null> {
    if (!await this.#fill(4)) return null;
    const bytes = new DataView(this.#buffer.buffer).getUint32(0, true);
    if (bytes > most) {
      throw new RangeError(
        `Cannot read a frame as it must have at most ${most} bytes: current value is ${bytes}`,
      );
    }
    if (!await this.#fill(4 + bytes)) return null;
    const body = this.#buffer.slice(4, 4 + bytes);
    this.#buffer.copyWithin(0, 4 + bytes, this.#filled);
    this.#filled -= 4 + bytes;
    return body;
  }

  async #fill(bytes: number): Promise<boolean> {
    if (this.#buffer.length < bytes) {
      const larger = new Uint8Array(bytes);
      larger.set(this.#buffer.subarray(0, this.#filled));
      this.#buffer = larger;
    }
    while (this.#filled < bytes) {
      const n = await this.#conn.read(this.#buffer.subarray(this.#filled));
      if (n === null) return false;
      this.#filled += n;
    }
    return true;
  }
}

/**
 * Writes all bytes of a frame.
 *
 * @param conn The connection.
 * @param frame The bytes.
 */
export async function writeAll(conn: Deno.Conn, frame: Uint8Array): Promise<void> {
  let sent = 0;
  while (sent < frame.length) sent += await conn.write(frame.subarray(sent));
}
