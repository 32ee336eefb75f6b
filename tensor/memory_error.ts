// The error of every device whose memory does not suffice, so that a program can tell it from others and say what of its own takes less.

/** A device's memory does not suffice; the message says what was asked for and what is held. */
export class OutOfMemoryError extends RangeError {
  /** @ignore */
  override readonly name = "OutOfMemoryError";
}
