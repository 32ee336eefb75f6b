// The calls of NCCL that the transport in collectives/nccl needs: NCCL 2.19 and newer, what is newer still is optional. Addresses,
// counts and streams are bigints, the fastest way through Deno's FFI. Calls that wait for other ranks (making, splitting and ending
// communicators, connecting) run off the main thread and give promises; operations only enqueue work. No algorithm lives here.

import { readCString } from "./address.ts";
import { CudaError, type CudaHandle, openCudaFile } from "./cuda_library.ts";

/** ncclComm_t */
export type NcclComm = CudaHandle<"ncclComm_t">;

/** Bytes of an ncclUniqueId. */
export const UNIQUE_ID_BYTES = 128;
/** The oldest version that is supported, as ncclGetVersion counts. */
const OLDEST = 21900;

/** ncclInProgress: no error, the communicator is at work. */
const IN_PROGRESS = 7;

/** Names of ncclResult_t. */
const RESULTS = [
  "ncclSuccess",
  "ncclUnhandledCudaError",
  "ncclSystemError",
  "ncclInternalError",
  "ncclInvalidArgument",
  "ncclInvalidUsage",
  "ncclRemoteError",
  "ncclInProgress",
  "ncclTimeout",
];

/** ncclDataType_t by element type; i16 travels as two bytes and has no reduction. */
export const NCCL_TYPES = { u8: 1, i32: 2, i64: 4, f16: 6, f32: 7, f64: 8, bf16: 9 } as const;
/** ncclRedOp_t by reduction. */
export const NCCL_OPS = { sum: 0, prod: 1, max: 2, min: 3, avg: 4 } as const;

const UNIQUE_ID = { struct: Array<"u64">(UNIQUE_ID_BYTES / 8).fill("u64") } as const;

const SYMBOLS = {
  // ncclResult_t ncclGetVersion(int *version);
  ncclGetVersion: { parameters: ["buffer"], result: "i32" },
  // ncclResult_t ncclGetUniqueId(ncclUniqueId *uniqueId);
  ncclGetUniqueId: { parameters: ["buffer"], result: "i32" },
  // const char *ncclGetErrorString(ncclResult_t result);
  ncclGetErrorString: { parameters: ["i32"], result: "pointer" },
  // const char *ncclGetLastError(ncclComm_t comm);
  ncclGetLastError: { parameters: ["u64"], result: "pointer" },
  // ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int nranks, ncclUniqueId commId, int rank, ncclConfig_t *config);
  ncclCommInitRankConfig: {
    parameters: ["buffer", "i32", UNIQUE_ID, "i32", "buffer"],
    result: "i32",
    nonblocking: true,
  },
  // ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *newcomm, ncclConfig_t *config);
  ncclCommSplit: {
    parameters: ["u64", "i32", "i32", "buffer", "buffer"],
    result: "i32",
    nonblocking: true,
  },
  // ncclResult_t ncclCommFinalize(ncclComm_t comm);
  ncclCommFinalize: { parameters: ["u64"], result: "i32", nonblocking: true },
  // ncclResult_t ncclCommDestroy(ncclComm_t comm);
  ncclCommDestroy: { parameters: ["u64"], result: "i32", nonblocking: true },
  // ncclResult_t ncclCommAbort(ncclComm_t comm);
  ncclCommAbort: { parameters: ["u64"], result: "i32", nonblocking: true },
  // ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *asyncError);
  ncclCommGetAsyncError: { parameters: ["u64", "buffer"], result: "i32" },
  // ncclResult_t ncclGroupStart(void);
  ncclGroupStart: { parameters: [], result: "i32" },
  // ncclResult_t ncclGroupEnd(void);
  ncclGroupEnd: { parameters: [], result: "i32" },
  // ncclResult_t ncclAllReduce(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype, ncclRedOp_t op,
  //   ncclComm_t comm, cudaStream_t stream);
  ncclAllReduce: {
    parameters: ["u64", "u64", "u64", "i32", "i32", "u64", "u64"],
    result: "i32",
  },
  // ncclResult_t ncclReduceScatter(const void *sendbuff, void *recvbuff, size_t recvcount, ncclDataType_t datatype, ncclRedOp_t op,
  //   ncclComm_t comm, cudaStream_t stream);
  ncclReduceScatter: {
    parameters: ["u64", "u64", "u64", "i32", "i32", "u64", "u64"],
    result: "i32",
  },
  // ncclResult_t ncclAllGather(const void *sendbuff, void *recvbuff, size_t sendcount, ncclDataType_t datatype, ncclComm_t comm,
  //   cudaStream_t stream);
  ncclAllGather: { parameters: ["u64", "u64", "u64", "i32", "u64", "u64"], result: "i32" },
  // ncclResult_t ncclBroadcast(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype, int root, ncclComm_t comm,
  //   cudaStream_t stream);
  ncclBroadcast: {
    parameters: ["u64", "u64", "u64", "i32", "i32", "u64", "u64"],
    result: "i32",
  },
  // ncclResult_t ncclReduce(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype, ncclRedOp_t op, int root,
  //   ncclComm_t comm, cudaStream_t stream);
  ncclReduce: {
    parameters: ["u64", "u64", "u64", "i32", "i32", "i32", "u64", "u64"],
    result: "i32",
  },
  // ncclResult_t ncclSend(const void *sendbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm, cudaStream_t stream);
  ncclSend: { parameters: ["u64", "u64", "i32", "i32", "u64", "u64"], result: "i32" },
  // ncclResult_t ncclRecv(void *recvbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm, cudaStream_t stream);
  ncclRecv: { parameters: ["u64", "u64", "i32", "i32", "u64", "u64"], result: "i32" },
  // ncclResult_t ncclAlltoAll(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype, ncclComm_t comm,
  //   cudaStream_t stream);  since 2.28
  ncclAlltoAll: {
    parameters: ["u64", "u64", "u64", "i32", "u64", "u64"],
    result: "i32",
    optional: true,
  },
} as const satisfies Deno.ForeignLibraryInterface;

/** The calls that connect ranks for the first time, made by the main thread's operations later; here on a pool thread. */
const CONNECTING = {
  ncclAllReduce: { ...SYMBOLS.ncclAllReduce, nonblocking: true },
  ncclSend: { ...SYMBOLS.ncclSend, nonblocking: true },
  ncclRecv: { ...SYMBOLS.ncclRecv, nonblocking: true },
  ncclAlltoAll: { ...SYMBOLS.ncclAlltoAll, nonblocking: true },
} as const satisfies Deno.ForeignLibraryInterface;

/** The bound symbols. */
export type NcclCalls = Deno.StaticForeignLibraryInterface<typeof SYMBOLS>;
/** Operations as calls off the main thread, which may wait until the peers make them, too. */
export type NcclConnecting = Deno.StaticForeignLibraryInterface<typeof CONNECTING>;

/** The library that was found. */
export interface Nccl {
  /** Its calls, named and ordered as in nccl.h; they return status codes. */
  readonly calls: NcclCalls;
  /** Operations that may wait for peers because they connect. */
  readonly connecting: NcclConnecting;
  /** The path or name by which it was opened. */
  readonly path: string;
  /** Version as people write it: `2.28.9`. */
  readonly version: string;
}

let loaded: Nccl | undefined;

/**
 * The NCCL of this process, opened at the first call. `LINA_NCCL_LIB` may hold its absolute path.
 *
 * @returns The library.
 * @throws {LibraryNotFoundError} If none can be opened; the message lists the paths tried.
 * @throws {CudaError} If it is older than 2.19.
 */
export function nccl(): Nccl {
  if (loaded) return loaded;
  const files = ["libnccl.so.2", "libnccl.so"];
  const { symbols, path } = openCudaFile("NCCL", files, "LINA_NCCL_LIB", SYMBOLS);
  const version = new Int32Array(1);
  check(symbols, symbols.ncclGetVersion(version), "ncclGetVersion", 0n);
  if (version[0] < OLDEST) {
    throw new Error(
      `Cannot use NCCL as ${path} must be 2.19 or newer: current value is ${
        versionText(version[0])
      }`,
    );
  }
  const connecting = Deno.dlopen(path, CONNECTING).symbols;
  return loaded = { calls: symbols, connecting, path, version: versionText(version[0]) };
}

/** 22809 is 2.28.9; up to 2.8 a version had one digit less. */
function versionText(code: number): string {
  const [major, minor] = code < 10_000
    ? [Math.floor(code / 1000), Math.floor(code / 100) % 10]
    : [Math.floor(code / 10_000), Math.floor(code / 100) % 100];
  return `${major}.${minor}.${code % 100}`;
}

/**
 * Turns a status code into an exception.
 *
 * @param code What the call returned.
 * @param call The call, as in nccl.h.
 * @param comm The communicator whose last error is told, if there is one.
 * @throws {CudaError} If the code is neither ncclSuccess nor ncclInProgress.
 */
export function checkNccl(code: number, call: string, comm: bigint = 0n): void {
  if (code !== 0) check(nccl().calls, code, call, comm);
}

function check(calls: NcclCalls, code: number, call: string, comm: bigint): void {
  if (code === 0 || code === IN_PROGRESS) return;
  const last = readCString(calls.ncclGetLastError(comm)).trim();
  const text = readCString(calls.ncclGetErrorString(code));
  const name = RESULTS[code] ?? "an unknown result";
  throw new CudaError(call, code, name, last === "" || last === text ? text : `${text}: ${last}`);
}

/** What ncclCommGetAsyncError writes; a small typed array would move once its buffer is taken, this never does. */
const state = new Int32Array(new ArrayBuffer(128), 0, 1);

/**
 * An id by which the ranks of a new communicator find each other.
 *
 * @returns 128 bytes, to be given to all of its ranks.
 */
export function uniqueId(): Uint8Array<ArrayBuffer> {
  const id = new Uint8Array(new ArrayBuffer(UNIQUE_ID_BYTES));
  checkNccl(nccl().calls.ncclGetUniqueId(id), "ncclGetUniqueId");
  return id;
}

/**
 * Makes a communicator; resolves once all ranks have called it.
 *
 * @param id What {@linkcode uniqueId} gave one of them.
 * @param rank This rank.
 * @param size Number of ranks.
 * @returns The communicator.
 * @throws {CudaError} If NCCL cannot connect the ranks.
 */
export async function initRank(
  id: Uint8Array<ArrayBuffer>,
  rank: number,
  size: number,
): Promise<NcclComm> {
  if (id.byteLength !== UNIQUE_ID_BYTES) {
    throw new RangeError(
      `Cannot make a communicator as its id must have ${UNIQUE_ID_BYTES} bytes: current value is ${id.byteLength}`,
    );
  }
  const out = new BigUint64Array(1);
  const { calls } = nccl();
  const code = await calls.ncclCommInitRankConfig(out, size, id, rank, configuration());
  checkNccl(code, "ncclCommInitRankConfig");
  return out[0] as NcclComm;
}

/**
 * Splits a communicator; resolves once all of its ranks have called it. Nothing else may run on it meanwhile.
 *
 * @param comm The communicator.
 * @param color Ranks of one color form a new one; −1 stays out.
 * @param key Order within the color.
 * @returns The new communicator, or null for those that stay out.
 * @throws {CudaError} If NCCL cannot connect the ranks.
 */
export async function splitComm(
  comm: NcclComm,
  color: number,
  key: number,
): Promise<NcclComm | null> {
  const out = new BigUint64Array(1);
  const code = await nccl().calls.ncclCommSplit(comm, color, key, out, configuration());
  checkNccl(code, "ncclCommSplit", comm);
  return out[0] === 0n ? null : out[0] as NcclComm;
}

/**
 * What has gone wrong with a communicator since it was made, as far as NCCL's own threads have noticed.
 *
 * @param comm The communicator.
 * @returns The error, or null.
 */
export function asyncError(comm: NcclComm): CudaError | null {
  const { calls } = nccl();
  try {
    const code = calls.ncclCommGetAsyncError(comm, state);
    check(calls, code === 0 ? state[0] : code, "ncclCommGetAsyncError", comm);
    return null;
  } catch (error) {
    return error as CudaError;
  }
}

/**
 * Ends a communicator whose operations are complete; resolves once its ranks have all called it, or one cannot.
 *
 * @param comm The communicator; it may not be used any more.
 */
export async function destroyComm(comm: NcclComm): Promise<void> {
  const { calls } = nccl();
  checkNccl(await calls.ncclCommFinalize(comm), "ncclCommFinalize", comm);
  checkNccl(await calls.ncclCommDestroy(comm), "ncclCommDestroy");
}

/**
 * Ends a communicator at once: what is in flight on this GPU stops, with wrong results.
 *
 * @param comm The communicator; it may not be used any more.
 */
export async function abortComm(comm: NcclComm): Promise<void> {
  checkNccl(await nccl().calls.ncclCommAbort(comm), "ncclCommAbort");
}

/**
 * An ncclConfig_t of NCCL 2.18, which every later version understands: blocking calls, all else as the library or its environment
 * variables (NCCL_MAX_CTAS, …) say.
 */
function configuration(): Uint8Array<ArrayBuffer> {
  const BYTES = 48, MAGIC = 0xcafebeef, VERSION = 21805, UNDEFINED = -(2 ** 31);
  const bytes = new Uint8Array(BYTES);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(BYTES), true); // size_t size
  view.setUint32(8, MAGIC, true); // unsigned int magic
  view.setUint32(12, VERSION, true); // unsigned int version
  view.setInt32(16, 1, true); // int blocking
  view.setInt32(20, UNDEFINED, true); // int cgaClusterSize
  view.setInt32(24, UNDEFINED, true); // int minCTAs
  view.setInt32(28, UNDEFINED, true); // int maxCTAs
  view.setBigUint64(32, 0n, true); // const char *netName
  view.setInt32(40, UNDEFINED, true); // int splitShare
  return bytes;
}
