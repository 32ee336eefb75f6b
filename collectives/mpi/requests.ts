// The messages of one operation: started with MPI_Isend and MPI_Irecv (and the few native collectives that help), tested together
// with MPI_Testall. Everything moves as bytes; messages over 1 GiB go in several pieces, so that no count overflows an int.

import { addressOf, checkMpi, type Mpi, type MpiComm } from "../../ffi/mpi.ts";
import { keepScratch } from "./memory.ts";

/** Most bytes of one message. */
const PIECE_BYTES = 2 ** 30;

/** A communicator as the algorithms need it. */
export interface Group {
  /** The library. */
  readonly mpi: Mpi;
  /** Its handle. */
  readonly comm: MpiComm;
  /** This process. */
  readonly rank: number;
  /** Number of ranks. */
  readonly size: number;
}

/** Requests in flight. Reused: a set is empty again once {@linkcode RequestSet.test} has returned true. */
export class RequestSet {
  readonly #mpi: Mpi;
  readonly #flag = new Int32Array(new ArrayBuffer(8)); // flag, count
  readonly #flagAt: bigint;
  #capacity = 0;
  #count = 0;
  #requests!: ArrayBuffer;
  #requestsAt = 0n;
  #statuses!: DataView;
  #statusesAt = 0n;
  /** Bytes that a receive must bring, −1 for what is not a receive; and from whom. */
  #expected: number[] = [];
  #from: number[] = [];

  /**
   * An empty set.
   *
   * @param mpi The library.
   */
  constructor(mpi: Mpi) {
    this.#mpi = mpi;
    this.#flagAt = addressOf(this.#flag.buffer);
    this.#grow(8);
  }

  #grow(capacity: number): void {
    const { handleBytes, statusBytes } = this.#mpi;
    const requests = new ArrayBuffer(capacity * handleBytes);
    if (this.#count > 0) new Uint8Array(requests).set(new Uint8Array(this.#requests));
    this.#requests = requests;
    this.#requestsAt = addressOf(requests);
    this.#statuses = new DataView(new ArrayBuffer(capacity * statusBytes));
    this.#statusesAt = addressOf(this.#statuses.buffer);
    this.#capacity = capacity;
  }

  /** Where the next request handle is to be written. */
  #next(expected: number, from: number): bigint {
    if (this.#count === this.#capacity) this.#grow(2 * this.#capacity);
    this.#expected[this.#count] = expected;
    this.#from[this.#count] = from;
    return this.#requestsAt + BigInt(this.#count * this.#mpi.handleBytes);
  }

  #started(code: number, call: string): void {
    checkMpi(code, call);
    this.#count++;
  }

  /** MPI_Isend of bytes; none are not sent. The receiver must expect the same number. */
  send(group: Group, address: bigint, bytes: number, to: number, tag: number): void {
    const { calls, byte } = this.#mpi;
    for (let at = 0; at < bytes; at += PIECE_BYTES) {
      const length = Math.min(PIECE_BYTES, bytes - at);
      const request = this.#next(-1, to);
      const from = address + BigInt(at);
      this.#started(calls.MPI_Isend(from, length, byte, to, tag, group.comm, request), "MPI_Isend");
    }
  }

  /** MPI_Irecv of bytes; none are not received. */
  receive(group: Group, address: bigint, bytes: number, from: number, tag: number): void {
    const { calls, byte } = this.#mpi;
    for (let at = 0; at < bytes; at += PIECE_BYTES) {
      const length = Math.min(PIECE_BYTES, bytes - at);
      const request = this.#next(length, from);
      const to = address + BigInt(at);
      this.#started(calls.MPI_Irecv(to, length, byte, from, tag, group.comm, request), "MPI_Irecv");
    }
  }

  /** MPI_Ibcast of bytes. */
  broadcast(group: Group, address: bigint, bytes: number, root: number): void {
    const { calls, byte } = this.#mpi;
    for (let at = 0; at < bytes; at += PIECE_BYTES) {
      const length = Math.min(PIECE_BYTES, bytes - at);
      const request = this.#next(-1, root);
      const start = address + BigInt(at);
      this.#started(calls.MPI_Ibcast(start, length, byte, root, group.comm, request), "MPI_Ibcast");
    }
  }

  /** MPI_Iallgather of a few bytes of each rank. */
  allGather(group: Group, send: bigint, bytes: number, receive: bigint): void {
    const { calls, byte } = this.#mpi;
    const request = this.#next(-1, -1);
    this.#started(
      calls.MPI_Iallgather(send, bytes, byte, receive, bytes, byte, group.comm, request),
      "MPI_Iallgather",
    );
  }

  /** MPI_Ibarrier. */
  barrier(group: Group): void {
    this.#started(
      this.#mpi.calls.MPI_Ibarrier(group.comm, this.#next(-1, -1)),
      "MPI_Ibarrier",
    );
  }

  /**
   * Lets MPI move on, and tells whether every request is complete.
   *
   * @returns Whether nothing is in flight any more.
   * @throws {MpiError} What went wrong with one of them.
   * @throws {RangeError} If a message was shorter than its receiver expected.
   */
  test(): boolean {
    if (this.#count === 0) return true;
    const { calls, errInStatus } = this.#mpi;
    const code = calls.MPI_Testall(
      this.#count,
      this.#requestsAt,
      this.#flagAt,
      this.#statusesAt,
    );
    if (code !== 0) {
      keepScratch(); // other requests of this set may still write
      const cause = code === errInStatus ? this.#firstError() : code;
      checkMpi(cause || code, "MPI_Testall");
    }
    if (this.#flag[0] === 0) return false;
    const count = this.#count;
    this.#count = 0;
    for (let i = 0; i < count; i++) if (this.#expected[i] >= 0) this.#checkLength(i);
    return true;
  }

  #firstError(): number {
    const { statusBytes, statusErrorOffset } = this.#mpi;
    for (let i = 0; i < this.#count; i++) {
      const error = this.#statuses.getInt32(i * statusBytes + statusErrorOffset, true);
      if (error !== 0 && error < this.#mpi.errInStatus) return error;
    }
    return 0;
  }

  #checkLength(i: number): void {
    const { calls, byte, statusBytes } = this.#mpi;
    const status = this.#statusesAt + BigInt(i * statusBytes);
    checkMpi(calls.MPI_Get_count(status, byte, this.#flagAt + 4n), "MPI_Get_count");
    if (this.#flag[1] !== this.#expected[i]) {
      throw new RangeError(
        `Cannot receive from rank ${this.#from[i]} as its message must have ${
          this.#expected[i]
        } bytes: current value is ${this.#flag[1]}`,
      );
    }
  }
}
