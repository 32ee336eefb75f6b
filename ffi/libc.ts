// The calls of the C library that shared memory, large copies, futexes and process supervision need. Linux and macOS; what only Linux has
// is optional. Opened once per process and never closed: a call after `close()` would crash the process.

const names = Deno.build.os === "darwin"
  ? ["/usr/lib/libSystem.B.dylib"]
  : ["libc.so.6", "libc.musl-x86_64.so.1", "libc.musl-aarch64.so.1", "libc.so"];

const SYMBOLS = {
  // void *mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset);
  mmap: {
    parameters: ["u64", "u64", "i32", "i32", "i32", "i64"],
    result: "u64",
  },
  // int munmap(void *addr, size_t length);
  munmap: { parameters: ["u64", "u64"], result: "i32" },
  // int madvise(void *addr, size_t length, int advice);
  madvise: { parameters: ["u64", "u64", "i32"], result: "i32" },
  // void *memcpy(void *dest, const void *src, size_t n);  on another thread: pages of a fresh array are made there, too
  memcpyElsewhere: {
    name: "memcpy",
    parameters: ["u64", "u64", "u64"],
    result: "u64",
    nonblocking: true,
  },
  // int memfd_create(const char *name, unsigned int flags);
  memfd_create: { parameters: ["buffer", "u32"], result: "i32", optional: true },
  // int open(const char *pathname, int flags, mode_t mode);
  open: { parameters: ["buffer", "i32", "u32"], result: "i32" },
  // int close(int fd);
  close: { parameters: ["i32"], result: "i32" },
  // int ftruncate(int fd, off_t length);
  ftruncate: { parameters: ["i32", "i64"], result: "i32" },
  // int usleep(useconds_t usec);
  usleep: { parameters: ["u32"], result: "i32" },
  // int sched_getaffinity(pid_t pid, size_t cpusetsize, cpu_set_t *mask);
  sched_getaffinity: { parameters: ["i32", "u64", "buffer"], result: "i32", optional: true },
  // int sched_setaffinity(pid_t pid, size_t cpusetsize, const cpu_set_t *mask);
  sched_setaffinity: { parameters: ["i32", "u64", "buffer"], result: "i32", optional: true },
  // int sched_yield(void);
  sched_yield: { parameters: [], result: "i32" },
  // long syscall(long number, ...);  used for futex(2), with up to six arguments
  syscall: {
    parameters: ["i64", "u64", "u64", "u64", "u64", "u64", "u64"],
    result: "i64",
    optional: true,
  },
  // int prctl(int option, unsigned long arg2, unsigned long arg3, unsigned long arg4, unsigned long arg5);
  prctl: { parameters: ["i32", "u64", "u64", "u64", "u64"], result: "i32", optional: true },
  // pid_t getppid(void);
  getppid: { parameters: [], result: "i32" },
  // int kill(pid_t pid, int sig);
  kill: { parameters: ["i32", "i32"], result: "i32" },
} as const satisfies Deno.ForeignLibraryInterface;

/** The bound symbols of the C library. */
export type Libc = Deno.StaticForeignLibraryInterface<typeof SYMBOLS>;

let bound: Libc | undefined;

/**
 * The C library of this process, opened at the first call.
 *
 * @returns Its symbols; those that this system lacks are null.
 * @throws {Error} If no C library can be opened; the message lists the names tried.
 */
export function libc(): Libc {
  if (bound) return bound;
  const causes: unknown[] = [];
  for (const name of names) {
    try {
      bound = Deno.dlopen(name, SYMBOLS).symbols;
      return bound;
    } catch (cause) {
      if (cause instanceof Deno.errors.NotCapable) throw cause;
      causes.push(cause);
    }
  }
  throw new Error(
    `Cannot open the C library as one of these must exist: current value is ${names.join(", ")}`,
    { cause: causes },
  );
}
