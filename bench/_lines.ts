// Lines of text over a connection, for benchmarks whose ranks are told what to do next. No format lives here.

/**
 * The lines that arrive.
 *
 * @param readable Bytes of a connection.
 * @returns One line after another, without its end; a last one without an end is left out.
 */
export async function* linesOf(
  readable: ReadableStream<Uint8Array<ArrayBuffer>>,
): AsyncGenerator<string, undefined> {
  let rest = "";
  for await (const text of readable.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop()!;
    yield* lines;
  }
}

/**
 * Sends a line.
 *
 * @param writer Takes bytes of a connection.
 * @param text The line, without its end.
 */
export async function writeLine(
  writer: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>,
  text: string,
): Promise<void> {
  await writer.write(new TextEncoder().encode(text + "\n"));
}
