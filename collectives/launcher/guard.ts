// What ends the ranks when the launcher is killed with SIGKILL and cannot do it itself: a small shell process, in a session of
// its own, that knows the ranks' process groups and reads from a pipe whose other end the launcher holds. The system closes the
// pipe when the launcher dies, however it dies. Ranks need to do nothing for it, so any program is covered.

const SCRIPT = `
trap '' HUP INT TERM
groups=
while read -r change group; do
  if [ "$change" = + ]; then
    groups="$groups $group"
  else
    kept=
    for g in $groups; do [ "$g" = "$group" ] || kept="$kept $g"; done
    groups=$kept
  fi
done
[ -n "$groups" ] || exit 0
for g in $groups; do kill -s TERM -- "-$g"; done
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  alive=
  for g in $groups; do kill -s 0 -- "-$g" && alive=yes; done
  [ -n "$alive" ] || exit 0
  sleep 0.1
done
for g in $groups; do kill -s KILL -- "-$g"; done
`;

/** Ends process groups when this process dies. */
export class Guard {
  #writer: WritableStreamDefaultWriter<Uint8Array>;
  #encoder = new TextEncoder();

  /** Starts the guarding process. */
  constructor() {
    const child = new Deno.Command("sh", {
      args: ["-c", SCRIPT],
      stdin: "piped",
      stdout: "null",
      stderr: "null",
      detached: true,
    }).spawn();
    child.unref();
    this.#writer = child.stdin.getWriter();
  }

  /** Adds a process group. @param group Its id. */
  async add(group: number): Promise<void> {
    await this.#write(`+ ${group}\n`);
  }

  /** Takes a process group out, once its leader has ended. @param group Its id. */
  async remove(group: number): Promise<void> {
    await this.#write(`- ${group}\n`);
  }

  /** Ends the guarding process; groups that were not removed are ended with it. */
  async close(): Promise<void> {
    try {
      await this.#writer.close();
    } catch {
      // somebody has ended it
    }
  }

  async #write(line: string): Promise<void> {
    try {
      await this.#writer.write(this.#encoder.encode(line));
    } catch {
      // somebody has ended it; the ranks run on unguarded
    }
  }
}
