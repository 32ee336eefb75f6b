// Whether a process still lives. A killed process stays in the table as a zombie until its parent reads its status, and its
// number may be given to another one later; so on Linux the state and the start time are read, elsewhere kill(pid, 0) decides.

import { libc } from "../../ffi/libc.ts";

/**
 * When a process started.
 *
 * @param pid The process.
 * @returns A number that differs between processes which had the same pid; 0 if it cannot be known.
 */
export function startTimeOf(pid: number): number {
  return statOf(pid)?.started ?? 0;
}

/**
 * Whether a process lives and is the one that was meant.
 *
 * @param pid The process.
 * @param started What {@linkcode startTimeOf} said about it in its own words.
 * @returns False once it has ended, even if nobody has read its exit status.
 */
export function isAlive(pid: number, started: number): boolean {
  if (Deno.build.os !== "linux") return libc().kill(pid, 0) === 0;
  const stat = statOf(pid);
  if (stat === null) return libc().kill(pid, 0) === 0; // out of descriptors is no reason to call a rank dead
  return stat.state !== "Z" && stat.state !== "X" && (started === 0 || stat.started === started);
}

function statOf(pid: number): { state: string; started: number } | null {
  let text: string;
  try {
    text = Deno.readTextFileSync(`/proc/${pid}/stat`);
  } catch {
    return null;
  }
  // The second field is the command in parentheses and may hold anything; the state follows it, the start time is field 22.
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
  return { state: fields[0], started: Number(fields[19]) | 0 };
}
