import assert from "node:assert/strict";
import { LocalStore } from "../rendezvous/local_store.ts";
import type { HostFlight } from "./flight.ts";
import { Watch } from "./watch.ts";

const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** Keeps the process running, as a program does that waits: the watch alone would not. */
async function running<T>(work: Promise<T>): Promise<T> {
  const timer = setInterval(() => {}, 1000);
  try {
    return await work;
  } finally {
    clearInterval(timer);
  }
}

interface Case {
  readonly departed?: ReadonlyMap<number, string>;
  readonly asyncError?: () => Error | null;
}

/** A watch over one operation that never ends. @returns What failed it, and when in ms. */
function watched({ departed = new Map(), asyncError = () => null }: Case): {
  watch: Watch;
  failed: Promise<{ error: Error; ms: number }>;
} {
  const request = { operation: "allReduce", sequence: 5, peer: 0 };
  const flights = [{ request, index: 3 }] as unknown as HostFlight[];
  const failed = Promise.withResolvers<{ error: Error; ms: number }>();
  const start = performance.now();
  const store = new LocalStore();
  const watch = new Watch({
    context: { rank: 1, size: 3, localRank: 1, store, departed },
    members: [4, 1, 2],
    id: "world/split1.0",
    rank: 1,
  }, {
    flights,
    begun: () => 4,
    asyncError,
    fail: (error) => failed.resolve({ error, ms: performance.now() - start }),
  });
  watch.told = true; // somebody awaits
  return {
    watch,
    get failed() {
      return running(failed.promise);
    },
  };
}

Deno.test("the watch names the rank that has left, though nobody asks, and no rank of another group", async () => {
  const lost = watched({ departed: new Map([[2, "has ended"], [7, "has ended"]]) });
  let other = 0;
  const others = watched({
    departed: new Map([[7, "has ended"]]),
    asyncError: () => (other++, null),
  });
  const { error, ms } = await lost.failed;
  assert.equal(
    error.message,
    "Cannot complete allReduce of world/split1.0 on rank 1 as every rank must take part: current value is that rank 2 has ended",
  );
  assert(ms >= 1000 && ms < 4000, `${ms} ms`);
  await pause(300);
  assert(other > 3, "nothing has failed it: it still looks");
  lost.watch.close();
  others.watch.close();
});

Deno.test("an error of NCCL waits a while for the name of the rank behind it", async () => {
  const reset = new Error("connection reset");
  const departed = new Map<number, string>();
  const named = watched({ departed, asyncError: () => reset });
  const unnamed = watched({ asyncError: () => reset });
  await pause(600);
  departed.set(4, "has ended");
  const { error } = await named.failed;
  assert.match(error.message, /that rank 0 has ended$/);
  assert.equal(error.cause, reset);
  assert.equal((await unnamed.failed).error, reset);
  named.watch.close();
  unnamed.watch.close();
});

Deno.test("an operation that stands still is named with the ranks that have not begun it", async () => {
  Deno.env.set("LINA_TIMEOUT_MS", "600");
  const hung = watched({});
  Deno.env.delete("LINA_TIMEOUT_MS");
  const { error } = await hung.failed;
  assert.match(
    error.message,
    /^Cannot complete allReduce 5 of world\/split1\.0 on rank 1 as it must end within 600 ms.*not arrived: rank 0, rank 2$/,
  );
  hung.watch.close();
});

Deno.test("an error that nobody gets ends the process", async () => {
  const uncaught = Promise.withResolvers<Error>();
  const listener = (event: ErrorEvent) => {
    event.preventDefault();
    uncaught.resolve(event.error);
  };
  addEventListener("error", listener);
  const { watch } = watched({});
  watch.told = false;
  const error = new Error("lost");
  watch.tellLater(error);
  assert.equal(await uncaught.promise, error);
  removeEventListener("error", listener);
  watch.close();
});
