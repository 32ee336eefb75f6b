// The machine address of a JavaScript buffer, for C calls that take addresses as u64. Nothing is allocated or freed here.

const addresses = new WeakMap<ArrayBufferLike, bigint>();

/**
 * The machine address of a buffer's bytes. They never move: taking `.buffer` of a small typed array has already moved its elements
 * out of V8's heap. The caller keeps the buffer alive for as long as the address is used.
 *
 * @param buffer The buffer.
 * @returns Its address; 0 for an empty buffer.
 */
export function addressOf(buffer: ArrayBufferLike): bigint {
  let address = addresses.get(buffer);
  if (address === undefined) {
    const pointer = Deno.UnsafePointer.of(new Uint8Array(buffer));
    address = BigInt(Deno.UnsafePointer.value(pointer));
    addresses.set(buffer, address);
  }
  return address;
}

let latest: readonly unknown[] = [];

/**
 * Keeps buffers until here: the garbage collector may take one as soon as no code behind refers to it, though C still uses its address.
 *
 * @param buffers What C has used up to this call.
 */
export function keepUntilHere(...buffers: readonly unknown[]): void {
  if (buffers !== latest) latest = buffers; // a use that no compiler removes
}

/**
 * A zero-terminated C string.
 *
 * @param text The text.
 * @returns Its bytes in UTF-8 and a zero; keep the array for as long as C uses it.
 */
export function cString(text: string): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(text + "\0");
}

/**
 * Reads a zero-terminated C string that a library owns.
 *
 * @param address Its address as a bigint or pointer; null and 0 give an empty text.
 * @returns The text.
 */
export function readCString(address: bigint | Deno.PointerValue): string {
  const pointer = typeof address === "bigint" ? Deno.UnsafePointer.create(address) : address;
  return pointer === null ? "" : Deno.UnsafePointerView.getCString(pointer);
}
