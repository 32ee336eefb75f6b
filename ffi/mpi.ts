// The calls of MPI that the transport in collectives/mpi needs, over Open MPI 4 and 5 or over MPICH 3 and 4 and what shares its
// ABI (Intel MPI, MVAPICH). The two differ in their handles: Open MPI's are pointers and the predefined ones are addresses of
// variables in the library; MPICH's are ints with known values. Everything else here hides that difference.
// Pointer arguments are u64 addresses as bigints, the fastest way through Deno's FFI. No algorithm lives here.

import { addressOf } from "./address.ts";
import { openFirst } from "./search.ts";

export { addressOf } from "./address.ts";

/** Marks the kind of a handle; exists only for the type checker. */
export declare const kind: unique symbol;
/** A handle of one kind: a pointer as a bigint in Open MPI, an int in MPICH. */
export type MpiHandle<Name extends string> = (bigint | number) & { readonly [kind]: Name };
/** MPI_Comm */
export type MpiComm = MpiHandle<"MPI_Comm">;
/** MPI_Group */
export type MpiGroup = MpiHandle<"MPI_Group">;
/** MPI_Datatype */
export type MpiDatatype = MpiHandle<"MPI_Datatype">;
/** MPI_Op */
export type MpiOp = MpiHandle<"MPI_Op">;
/** MPI_Errhandler */
export type MpiErrhandler = MpiHandle<"MPI_Errhandler">;

/** Which of the two ABIs a library has. */
export type MpiFlavor = "Open MPI" | "MPICH";

/** Element types that MPI reduces. */
export type MpiDatatypeName = "f32" | "f64" | "i32" | "u8" | "i64";

/** Reductions that MPI carries out. */
export type MpiOpName = "sum" | "min" | "max" | "prod";

// A call takes handles in registers: as u64 in Open MPI, as i32 in MPICH. Arrays of handles and handles that a call writes are memory.
const symbolsWith = <const H extends "u64" | "i32">(handle: H) =>
  ({
    // int MPI_Initialized(int *flag);
    MPI_Initialized: { parameters: ["u64"], result: "i32" },
    // int MPI_Init_thread(int *argc, char ***argv, int required, int *provided);
    MPI_Init_thread: { parameters: ["u64", "u64", "i32", "u64"], result: "i32" },
    // int MPI_Finalize(void);
    MPI_Finalize: { parameters: [], result: "i32" },
    // int MPI_Abort(MPI_Comm comm, int errorcode);
    MPI_Abort: { parameters: [handle, "i32"], result: "i32" },
    // int MPI_Error_string(int errorcode, char *string, int *resultlen);
    MPI_Error_string: { parameters: ["i32", "u64", "u64"], result: "i32" },
    // int MPI_Comm_set_errhandler(MPI_Comm comm, MPI_Errhandler errhandler);
    MPI_Comm_set_errhandler: { parameters: [handle, handle], result: "i32" },
    // int MPI_Comm_get_attr(MPI_Comm comm, int comm_keyval, void *attribute_val, int *flag);
    MPI_Comm_get_attr: { parameters: [handle, "i32", "u64", "u64"], result: "i32" },
    // int MPI_Comm_rank(MPI_Comm comm, int *rank);
    MPI_Comm_rank: { parameters: [handle, "u64"], result: "i32" },
    // int MPI_Comm_size(MPI_Comm comm, int *size);
    MPI_Comm_size: { parameters: [handle, "u64"], result: "i32" },
    // int MPI_Comm_split(MPI_Comm comm, int color, int key, MPI_Comm *newcomm);
    MPI_Comm_split: { parameters: [handle, "i32", "i32", "u64"], result: "i32" },
    // int MPI_Comm_create_group(MPI_Comm comm, MPI_Group group, int tag, MPI_Comm *newcomm);
    MPI_Comm_create_group: { parameters: [handle, handle, "i32", "u64"], result: "i32" },
    // int MPI_Comm_group(MPI_Comm comm, MPI_Group *group);
    MPI_Comm_group: { parameters: [handle, "u64"], result: "i32" },
    // int MPI_Comm_free(MPI_Comm *comm);
    MPI_Comm_free: { parameters: ["u64"], result: "i32" },
    // int MPI_Group_incl(MPI_Group group, int n, const int ranks[], MPI_Group *newgroup);
    MPI_Group_incl: { parameters: [handle, "i32", "u64", "u64"], result: "i32" },
    // int MPI_Group_free(MPI_Group *group);
    MPI_Group_free: { parameters: ["u64"], result: "i32" },
    // int MPI_Isend(const void *buf, int count, MPI_Datatype datatype, int dest, int tag, MPI_Comm comm, MPI_Request *request);
    MPI_Isend: { parameters: ["u64", "i32", handle, "i32", "i32", handle, "u64"], result: "i32" },
    // int MPI_Irecv(void *buf, int count, MPI_Datatype datatype, int source, int tag, MPI_Comm comm, MPI_Request *request);
    MPI_Irecv: { parameters: ["u64", "i32", handle, "i32", "i32", handle, "u64"], result: "i32" },
    // int MPI_Ibcast(void *buffer, int count, MPI_Datatype datatype, int root, MPI_Comm comm, MPI_Request *request);
    MPI_Ibcast: { parameters: ["u64", "i32", handle, "i32", handle, "u64"], result: "i32" },
    // int MPI_Ibarrier(MPI_Comm comm, MPI_Request *request);
    MPI_Ibarrier: { parameters: [handle, "u64"], result: "i32" },
    // int MPI_Iallgather(const void *sendbuf, int sendcount, MPI_Datatype sendtype, void *recvbuf, int recvcount,
    //   MPI_Datatype recvtype, MPI_Comm comm, MPI_Request *request);
    MPI_Iallgather: {
      parameters: ["u64", "i32", handle, "u64", "i32", handle, handle, "u64"],
      result: "i32",
    },
    // int MPI_Testall(int count, MPI_Request array_of_requests[], int *flag, MPI_Status array_of_statuses[]);
    MPI_Testall: { parameters: ["i32", "u64", "u64", "u64"], result: "i32" },
    // int MPI_Get_count(const MPI_Status *status, MPI_Datatype datatype, int *count);
    MPI_Get_count: { parameters: ["u64", handle, "u64"], result: "i32" },
    // int MPI_Reduce_local(const void *inbuf, void *inoutbuf, int count, MPI_Datatype datatype, MPI_Op op);
    MPI_Reduce_local: { parameters: ["u64", "u64", "i32", handle, handle], result: "i32" },
  }) as const satisfies Deno.ForeignLibraryInterface;

/** MPI's calls, named and ordered as in the standard; addresses are bigints; each but `check`ed by the caller returns a status code. */
export interface MpiCalls {
  /** int MPI_Initialized(int *flag) */
  MPI_Initialized(flag: bigint): number;
  /** int MPI_Init_thread(int *argc, char ***argv, int required, int *provided) */
  MPI_Init_thread(argc: bigint, argv: bigint, required: number, provided: bigint): number;
  /** int MPI_Finalize(void) */
  MPI_Finalize(): number;
  /** int MPI_Abort(MPI_Comm comm, int errorcode) */
  MPI_Abort(comm: MpiComm, errorcode: number): number;
  /** int MPI_Error_string(int errorcode, char *string, int *resultlen) */
  MPI_Error_string(errorcode: number, string: bigint, resultlen: bigint): number;
  /** int MPI_Comm_set_errhandler(MPI_Comm comm, MPI_Errhandler errhandler) */
  MPI_Comm_set_errhandler(comm: MpiComm, errhandler: MpiErrhandler): number;
  /** int MPI_Comm_get_attr(MPI_Comm comm, int comm_keyval, void *attribute_val, int *flag) */
  MPI_Comm_get_attr(comm: MpiComm, keyval: number, value: bigint, flag: bigint): number;
  /** int MPI_Comm_rank(MPI_Comm comm, int *rank) */
  MPI_Comm_rank(comm: MpiComm, rank: bigint): number;
  /** int MPI_Comm_size(MPI_Comm comm, int *size) */
  MPI_Comm_size(comm: MpiComm, size: bigint): number;
  /** int MPI_Comm_split(MPI_Comm comm, int color, int key, MPI_Comm *newcomm) */
  MPI_Comm_split(comm: MpiComm, color: number, key: number, newcomm: bigint): number;
  /** int MPI_Comm_create_group(MPI_Comm comm, MPI_Group group, int tag, MPI_Comm *newcomm) */
  MPI_Comm_create_group(comm: MpiComm, group: MpiGroup, tag: number, newcomm: bigint): number;
  /** int MPI_Comm_group(MPI_Comm comm, MPI_Group *group) */
  MPI_Comm_group(comm: MpiComm, group: bigint): number;
  /** int MPI_Comm_free(MPI_Comm *comm) */
  MPI_Comm_free(comm: bigint): number;
  /** int MPI_Group_incl(MPI_Group group, int n, const int ranks[], MPI_Group *newgroup) */
  MPI_Group_incl(group: MpiGroup, n: number, ranks: bigint, newgroup: bigint): number;
  /** int MPI_Group_free(MPI_Group *group) */
  MPI_Group_free(group: bigint): number;
  /** int MPI_Isend(const void *buf, int count, MPI_Datatype, int dest, int tag, MPI_Comm, MPI_Request *) */
  MPI_Isend(
    buf: bigint,
    count: number,
    datatype: MpiDatatype,
    dest: number,
    tag: number,
    comm: MpiComm,
    request: bigint,
  ): number;
  /** int MPI_Irecv(void *buf, int count, MPI_Datatype, int source, int tag, MPI_Comm, MPI_Request *) */
  MPI_Irecv(
    buf: bigint,
    count: number,
    datatype: MpiDatatype,
    source: number,
    tag: number,
    comm: MpiComm,
    request: bigint,
  ): number;
  /** int MPI_Ibcast(void *buffer, int count, MPI_Datatype, int root, MPI_Comm, MPI_Request *) */
  MPI_Ibcast(
    buffer: bigint,
    count: number,
    datatype: MpiDatatype,
    root: number,
    comm: MpiComm,
    request: bigint,
  ): number;
  /** int MPI_Ibarrier(MPI_Comm comm, MPI_Request *request) */
  MPI_Ibarrier(comm: MpiComm, request: bigint): number;
  /** int MPI_Iallgather(const void *sendbuf, int sendcount, MPI_Datatype, void *recvbuf, int recvcount, MPI_Datatype, MPI_Comm, MPI_Request *) */
  MPI_Iallgather(
    sendbuf: bigint,
    sendcount: number,
    sendtype: MpiDatatype,
    recvbuf: bigint,
    recvcount: number,
    recvtype: MpiDatatype,
    comm: MpiComm,
    request: bigint,
  ): number;
  /** int MPI_Testall(int count, MPI_Request requests[], int *flag, MPI_Status statuses[]) */
  MPI_Testall(count: number, requests: bigint, flag: bigint, statuses: bigint): number;
  /** int MPI_Get_count(const MPI_Status *status, MPI_Datatype datatype, int *count) */
  MPI_Get_count(status: bigint, datatype: MpiDatatype, count: bigint): number;
  /** int MPI_Reduce_local(const void *inbuf, void *inoutbuf, int count, MPI_Datatype, MPI_Op) */
  MPI_Reduce_local(
    inbuf: bigint,
    inoutbuf: bigint,
    count: number,
    datatype: MpiDatatype,
    op: MpiOp,
  ): number;
}

/** An MPI library that has been loaded. */
export interface Mpi {
  /** Its calls. */
  readonly calls: MpiCalls;
  /** Which ABI it has. */
  readonly flavor: MpiFlavor;
  /** The path or name that it was loaded from. */
  readonly path: string;
  /** What the library calls itself: `Open MPI v4.1.4, …`. */
  readonly version: string;
  /** Bytes of one handle in memory. */
  readonly handleBytes: 4 | 8;
  /** Bytes of one MPI_Status. */
  readonly statusBytes: number;
  /** Byte offset of MPI_ERROR in an MPI_Status. */
  readonly statusErrorOffset: number;
  /** MPI_ERR_IN_STATUS */
  readonly errInStatus: number;
  /** MPI_TAG_UB, the key of the attribute. */
  readonly tagUpperBoundKey: number;
  /** MPI_COMM_WORLD */
  readonly world: MpiComm;
  /** MPI_ERRORS_RETURN */
  readonly errorsReturn: MpiErrhandler;
  /** MPI_BYTE */
  readonly byte: MpiDatatype;
  /** MPI_FLOAT, MPI_DOUBLE, MPI_INT32_T, MPI_UINT8_T, MPI_INT64_T */
  readonly datatypes: Readonly<Record<MpiDatatypeName, MpiDatatype>>;
  /** MPI_SUM, MPI_MIN, MPI_MAX, MPI_PROD */
  readonly ops: Readonly<Record<MpiOpName, MpiOp>>;
  /** Reads a handle that a call has written at the start of a buffer. */
  readHandle<H extends MpiComm | MpiGroup>(at: ArrayBuffer): H;
}

/** A call of MPI returned a status other than MPI_SUCCESS. */
export class MpiError extends Error {
  /** @ignore */
  override readonly name = "MpiError";
  /** The call, as in the standard. */
  readonly call: string;
  /** Its status code. */
  readonly code: number;

  /**
   * Describes the failure of a call.
   *
   * @param call The call, as in the standard.
   * @param code Its status code.
   * @param text What MPI_Error_string says.
   */
  constructor(call: string, code: number, text: string) {
    super(`Cannot complete ${call} as its status must be MPI_SUCCESS: current value is ${text}`);
    this.call = call;
    this.code = code;
  }
}

// Open MPI defines each predefined handle as the address of one of these.
const OPEN_MPI_STATICS = {
  ompi_mpi_comm_world: { type: "pointer" },
  ompi_mpi_errors_return: { type: "pointer" },
  ompi_mpi_byte: { type: "pointer" },
  ompi_mpi_float: { type: "pointer" },
  ompi_mpi_double: { type: "pointer" },
  ompi_mpi_int32_t: { type: "pointer" },
  ompi_mpi_uint8_t: { type: "pointer" },
  ompi_mpi_int64_t: { type: "pointer" },
  ompi_mpi_op_sum: { type: "pointer" },
  ompi_mpi_op_min: { type: "pointer" },
  ompi_mpi_op_max: { type: "pointer" },
  ompi_mpi_op_prod: { type: "pointer" },
} as const satisfies Deno.ForeignLibraryInterface;

const PROBE = {
  // int MPI_Get_library_version(char *version, int *resultlen);  may be called before MPI_Init
  MPI_Get_library_version: { parameters: ["buffer", "buffer"], result: "i32" },
  // struct ompi_communicator_t ompi_mpi_comm_world;  tells Open MPI from MPICH
  ompi_mpi_comm_world: { type: "pointer", optional: true },
} as const satisfies Deno.ForeignLibraryInterface;

/** MPI_MAX_LIBRARY_VERSION_STRING, the larger of the two. */
const VERSION_BYTES = 8192;
/** MPI_MAX_ERROR_STRING, the larger of the two. */
const ERROR_BYTES = 512;

const OPEN_MPI_PATHS = [
  "/usr/lib/x86_64-linux-gnu/libmpi.so.40", // Debian, Ubuntu
  "/usr/lib/aarch64-linux-gnu/libmpi.so.40",
  "/usr/lib64/openmpi/lib/libmpi.so.40", // Fedora, RHEL
  "/opt/amazon/openmpi/lib64/libmpi.so.40",
  "/opt/homebrew/lib/libmpi.40.dylib", // macOS
  "/usr/local/lib/libmpi.40.dylib",
];
const MPICH_PATHS = [
  "/usr/lib/x86_64-linux-gnu/libmpich.so.12",
  "/usr/lib/aarch64-linux-gnu/libmpich.so.12",
  "/usr/lib64/mpich/lib/libmpi.so.12",
];

/** The launcher's library comes first, and bare names before fixed places: they follow what a module or conda has put on the path. */
function candidates(): string[] {
  const openMpi = ["libmpi.so.40", ...OPEN_MPI_PATHS, "libmpi.40.dylib"];
  const mpich = ["libmpi.so.12", "libmpich.so.12", ...MPICH_PATHS, "libmpi.12.dylib"];
  const hydra = Deno.env.has("PMI_RANK") && !Deno.env.has("OMPI_COMM_WORLD_RANK");
  return hydra ? [...mpich, ...openMpi] : [...openMpi, ...mpich];
}

let loaded: Mpi | undefined;

/**
 * The MPI library of this process, loaded at the first call. `LINA_MPI_LIB` may hold its absolute path.
 *
 * @returns The library; MPI is not yet initialized.
 * @throws {Error} If none can be loaded; the message lists the paths tried.
 */
export function mpi(): Mpi {
  if (loaded) return loaded;
  const { symbols, path } = openFirst("Open MPI or MPICH", candidates(), PROBE, {
    env: "LINA_MPI_LIB",
  });
  const text = new Uint8Array(VERSION_BYTES), length = new Int32Array(1);
  symbols.MPI_Get_library_version(text, length);
  const version = decode(text, length[0]);
  loaded = symbols.ompi_mpi_comm_world === null
    ? loadMpich(path, version)
    : loadOpenMpi(path, version);
  return loaded;
}

function loadOpenMpi(path: string, version: string): Mpi {
  const { symbols } = Deno.dlopen(path, { ...symbolsWith("u64"), ...OPEN_MPI_STATICS });
  const at = <H>(pointer: Deno.PointerValue): H => Deno.UnsafePointer.value(pointer) as H;
  return {
    calls: symbols as unknown as MpiCalls,
    flavor: "Open MPI",
    path,
    version,
    handleBytes: 8,
    statusBytes: 24, // int source, tag, error, cancelled; size_t bytes
    statusErrorOffset: 8,
    errInStatus: 18,
    tagUpperBoundKey: 0,
    world: at(symbols.ompi_mpi_comm_world),
    errorsReturn: at(symbols.ompi_mpi_errors_return),
    byte: at(symbols.ompi_mpi_byte),
    datatypes: {
      f32: at(symbols.ompi_mpi_float),
      f64: at(symbols.ompi_mpi_double),
      i32: at(symbols.ompi_mpi_int32_t),
      u8: at(symbols.ompi_mpi_uint8_t),
      i64: at(symbols.ompi_mpi_int64_t),
    },
    ops: {
      sum: at(symbols.ompi_mpi_op_sum),
      min: at(symbols.ompi_mpi_op_min),
      max: at(symbols.ompi_mpi_op_max),
      prod: at(symbols.ompi_mpi_op_prod),
    },
    readHandle: <H>(buffer: ArrayBuffer): H => new BigUint64Array(buffer, 0, 1)[0] as H,
  };
}

/** Values of MPICH's mpi.h; they are part of the ABI that MPICH, Intel MPI and MVAPICH agreed on. */
function loadMpich(path: string, version: string): Mpi {
  const { symbols } = Deno.dlopen(path, symbolsWith("i32"));
  return {
    calls: symbols as unknown as MpiCalls,
    flavor: "MPICH",
    path,
    version,
    handleBytes: 4,
    statusBytes: 20, // int count_lo, count_hi_and_cancelled, source, tag, error
    statusErrorOffset: 16,
    errInStatus: 17,
    tagUpperBoundKey: 0x64400001,
    world: 0x44000000 as MpiComm,
    errorsReturn: 0x54000001 as MpiErrhandler,
    byte: 0x4c00010d as MpiDatatype,
    datatypes: {
      f32: 0x4c00040a as MpiDatatype,
      f64: 0x4c00080b as MpiDatatype,
      i32: 0x4c000439 as MpiDatatype,
      u8: 0x4c00013b as MpiDatatype,
      i64: 0x4c00083a as MpiDatatype,
    },
    ops: {
      sum: 0x58000003 as MpiOp,
      min: 0x58000002 as MpiOp,
      max: 0x58000001 as MpiOp,
      prod: 0x58000004 as MpiOp,
    },
    readHandle: <H>(buffer: ArrayBuffer): H => new Int32Array(buffer, 0, 1)[0] as H,
  };
}

/**
 * Turns a status code into an exception.
 *
 * @param code What the call returned.
 * @param call The call, as in the standard.
 * @throws {MpiError} If the code is not MPI_SUCCESS.
 */
export function checkMpi(code: number, call: string): void {
  if (code !== 0) throw new MpiError(call, code, errorText(code));
}

function errorText(code: number): string {
  const text = new ArrayBuffer(ERROR_BYTES), length = new Int32Array(new ArrayBuffer(4));
  mpi().calls.MPI_Error_string(code, addressOf(text), addressOf(length.buffer));
  return `${code}, ${decode(new Uint8Array(text), length[0])}`;
}

function decode(bytes: Uint8Array, length: number): string {
  return new TextDecoder().decode(bytes.subarray(0, length)).replace(/[\s\0]+$/, "");
}
