// What tells whether two processes can share memory: they must run on one booted system, in the same namespaces.
// And what tells whether they can share a GPU: they must run on one machine.

/**
 * A name of this host and the namespaces of this process.
 *
 * @returns The same text in two processes exactly if they can share memory.
 */
export function hostIdentity(): string {
  if (Deno.build.os !== "linux") return Deno.hostname();
  const net = Deno.readLinkSync("/proc/self/ns/net");
  const pid = Deno.readLinkSync("/proc/self/ns/pid");
  return `${machineIdentity()} ${net} ${pid}`;
}

/**
 * A name of this machine.
 *
 * @returns The same text in two processes of one booted system, whatever their namespaces.
 */
export function machineIdentity(): string {
  if (Deno.build.os !== "linux") return Deno.hostname();
  return Deno.readTextFileSync("/proc/sys/kernel/random/boot_id").trim();
}

/**
 * An address of this host that others can reach.
 *
 * @returns Its first IPv4 address that is not loopback; loopback if it has no other.
 */
export function outwardAddress(): string {
  const outward = Deno.networkInterfaces().find((i) =>
    i.family === "IPv4" && !i.address.startsWith("127.")
  );
  return outward?.address ?? "127.0.0.1";
}
