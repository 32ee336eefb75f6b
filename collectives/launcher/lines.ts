// Cuts the bytes that a process writes into lines. A line is given out when it is whole, so that lines of several ranks never
// mix; what a carriage return overwrites is dropped, as a terminal would. Text in progress after a carriage return (a progress
// bar) can be looked at before its line ends.

const NEWLINE = 10;
const RETURN = 13;
/** A line longer than this is given out in pieces. */
const MAX_LINE_BYTES = 1 << 20;

/** Assembles the lines of one stream. */
export class LineAssembler {
  #parts: Uint8Array[] = [];
  #bytes = 0;
  #overwritten = false;
  #pendingReturn = false;

  /**
   * Takes bytes.
   *
   * @param chunk The bytes; they are copied where they are kept.
   * @returns The lines that are whole now, without their line ends.
   */
  push(chunk: Uint8Array): Uint8Array[] {
    const lines: Uint8Array[] = [];
    let start = 0;
    for (let i = 0; i < chunk.length; i++) {
      const byte = chunk[i];
      if (byte === NEWLINE) {
        this.#keep(chunk.subarray(start, i));
        lines.push(this.#take());
        start = i + 1;
        this.#pendingReturn = false;
      } else if (byte === RETURN) {
        this.#keep(chunk.subarray(start, i));
        start = i + 1;
        this.#pendingReturn = true;
        this.#overwritten = true;
      } else if (this.#pendingReturn) {
        this.#parts = []; // the text before the return is overwritten; "\r\n" is not, and does not come here
        this.#bytes = 0;
        this.#pendingReturn = false;
      }
    }
    this.#keep(chunk.subarray(start));
    if (this.#bytes > MAX_LINE_BYTES) lines.push(this.#take());
    return lines;
  }

  /** The unfinished line, if a carriage return has made it a progress line; else null. */
  get live(): Uint8Array | null {
    return this.#overwritten && this.#bytes > 0 ? join(this.#parts, this.#bytes) : null;
  }

  /** At the end of the stream: the line that had no end. @returns It, or null. */
  flush(): Uint8Array | null {
    return this.#bytes > 0 ? this.#take() : null;
  }

  #keep(bytes: Uint8Array): void {
    if (bytes.length === 0) return;
    this.#parts.push(bytes.slice());
    this.#bytes += bytes.length;
  }

  #take(): Uint8Array {
    const line = join(this.#parts, this.#bytes);
    this.#parts = [];
    this.#bytes = 0;
    this.#overwritten = false;
    return line;
  }
}

function join(parts: readonly Uint8Array[], bytes: number): Uint8Array {
  if (parts.length === 1) return parts[0];
  const all = new Uint8Array(bytes);
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}
