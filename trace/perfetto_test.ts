import assert from "node:assert/strict";
import fc from "fast-check";
import { clockOffset, type Ranks } from "./clock.ts";
import { type Category, now, Recorder, type Span } from "./mod.ts";
import { traceEvents } from "./events.ts";
import { flowsOf, keptSpans, writeTrace } from "./perfetto.ts";

const folder = Deno.makeTempDirSync({ prefix: "lina-trace-" });
Deno.test.afterAll(() => Deno.removeSync(folder, { recursive: true }));

interface Event {
  ph: string;
  pid: number;
  tid: number;
  name: string;
  ts: number;
  dur: number;
  id: number;
  cat: string;
  bp?: string;
  args?: Record<string, unknown>;
}

/** Ranks of this process that exchange messages. */
function makeRanks(size: number): Ranks[] {
  const boxes = new Map<string, { queue: unknown[]; waiting: ((x: unknown) => void)[] }>();
  const box = (key: string) => {
    if (!boxes.has(key)) boxes.set(key, { queue: [], waiting: [] });
    return boxes.get(key)!;
  };
  const put = (key: string, x: unknown) => {
    const { queue, waiting } = box(key);
    if (waiting.length > 0) waiting.shift()!(x);
    else queue.push(x);
  };
  const take = (key: string): Promise<unknown> => {
    const { queue, waiting } = box(key);
    return queue.length > 0
      ? Promise.resolve(queue.shift())
      : new Promise((resolve) => waiting.push(resolve));
  };
  return Array.from({ length: size }, (_, rank): Ranks => ({
    rank,
    size,
    send: (x, to) => Promise.resolve(put(`${rank}>${to}`, x.slice())),
    async recv(out, from) {
      const x = await take(`${from}>${rank}`) as Float64Array;
      assert.equal(x.constructor, out.constructor);
      assert.equal(x.length, out.length);
      out.set(x);
    },
    async allGather(x, out) {
      for (let to = 0; to < size; to++) put(`g${rank}>${to}`, x.slice());
      for (let from = 0; from < size; from++) {
        out.set(await take(`g${from}>${rank}`) as Float64Array, from * x.length);
      }
    },
  }));
}

/** Writes the spans of some ranks, whose clocks are ahead of the true time by `skews`, and reads the file. */
async function trace(
  spans: readonly Span[][],
  skews: readonly number[] = [],
  limit?: number,
): Promise<Event[]> {
  const path = `${folder}/trace.json`;
  const all = makeRanks(spans.length);
  await Promise.all(spans.map((own, rank) => {
    const recorder = new Recorder();
    recorder.capturing = true;
    for (const span of own) recorder.record(span);
    const clock = () => now() + (skews[rank] ?? 0);
    return writeTrace(path, { ranks: all[rank], recorder, clock, limit });
  }));
  const file = JSON.parse(Deno.readTextFileSync(path));
  assert.equal(file.displayTimeUnit, "ms");
  const most = Math.floor((limit ?? Infinity) / spans.length);
  const dropped_spans = spans.reduce((sum, own) => sum + Math.max(0, own.length - most), 0);
  assert.deepEqual(file.otherData, { dropped_spans, ranks: spans.length });
  return file.traceEvents;
}

/** Every event has the fields that the Trace Event Format asks for, and spans of a row are nested or apart. */
function checkFormat(events: readonly Event[]): void {
  const rows = new Map<string, Event[]>();
  for (const event of events) {
    assert.ok(Number.isInteger(event.pid) && Number.isInteger(event.tid));
    assert.ok(["M", "X", "s", "f", "C"].includes(event.ph), event.ph);
    if (event.ph === "M") continue;
    assert.ok(Number.isFinite(event.ts) && event.ts >= 0, String(event.ts));
    assert.equal(typeof event.cat, "string");
    if (event.ph === "X") {
      assert.ok(Number.isFinite(event.dur) && event.dur >= 0);
      const key = `${event.pid}.${event.tid}`;
      rows.set(key, [...rows.get(key) ?? [], event]);
    }
  }
  const ns = (time: number) => Math.round(time * 1000);
  for (const [key, row] of rows) {
    const [pid, tid] = key.split(".").map(Number);
    const of = (name: string) =>
      events.filter((e) => e.ph === "M" && e.name === name && e.pid === pid).length;
    assert.equal(of("process_name"), 1);
    const threads = events.filter((e) =>
      e.name === "thread_name" && e.pid === pid && e.tid === tid
    );
    assert.equal(threads.length, 1);
    const open: number[] = [];
    let last = 0;
    for (const event of row) {
      const start = ns(event.ts), end = start + ns(event.dur);
      assert.ok(start >= last, "in order of their start");
      last = start;
      while (open.length > 0 && open.at(-1)! <= start) open.pop();
      assert.ok(open.length === 0 || end <= open.at(-1)!, "nested");
      open.push(end);
    }
  }
  checkArrows(events);
}

/**
 * Every arrow has one start and one end that agree in id, category and name, not back in time, each strictly inside a slice of its row:
 * then viewers that go through the events by time find both and hang them on the right slices.
 */
function checkArrows(events: readonly Event[]): void {
  const ns = (time: number) => Math.round(time * 1000);
  const slices = Map.groupBy(events.filter((e) => e.ph === "X"), (e) => `${e.pid}.${e.tid}`);
  const starts = new Map<string, Event>(), ends = new Set<string>();
  const key = ({ id, cat, name }: Event) => `${id} ${cat} ${name}`;
  for (const event of events.filter((e) => e.ph === "s" || e.ph === "f")) {
    assert.ok(Number.isSafeInteger(event.id));
    assert.ok(
      slices.get(`${event.pid}.${event.tid}`)!.filter((e) =>
        ns(e.ts) < ns(event.ts) && ns(event.ts) < ns(e.ts) + ns(e.dur)
      ).length === 1,
      `${event.name} ${event.ph} at ${event.ts} hangs on no single slice`,
    );
    if (event.ph === "f") continue;
    assert.ok(!starts.has(key(event)), `two arrows ${key(event)}`);
    starts.set(key(event), event);
  }
  for (const event of events.filter((e) => e.ph === "f")) {
    assert.equal(event.bp, "e");
    const start = starts.get(key(event)) ?? assert.fail(`no start of ${key(event)}`);
    if (event.name === "gradient") assert.ok(ns(start.ts) <= ns(event.ts), "forward in time");
    ends.add(key(event));
  }
  assert.equal(ends.size, starts.size);
}

const spanArbitrary = fc.record({
  track: fc.constantFrom("compute", "world", "world/dup1", "copy"),
  name: fc.string(),
  category: fc.constantFrom<Category>("compute", "gemm", "allToAll", "allReduce", "comm", "wait"),
  start: fc.nat(50_000), // ns: fc.double() would give numbers near 0 almost always
  dur: fc.oneof(fc.constant(0), fc.nat(30_000)),
}).map(({ start, dur, ...rest }): Span => ({
  ...rest,
  start: 1e12 + start / 1000,
  end: 1e12 + (start + dur) / 1000,
}));

Deno.test("every span of every rank is in the file once, on rows where spans nest", async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.array(spanArbitrary, { maxLength: 30 }), { minLength: 1, maxLength: 3 }),
      async (spans) => {
        const events = await trace(spans);
        checkFormat(events);
        const origin = Math.min(...spans.flat().map((s) => s.start));
        spans.forEach((own, rank) => {
          const shown = events.filter((e) => e.ph === "X" && e.pid === rank)
            .map((e) => `${e.name} ${e.cat} ${e.ts.toFixed(2)} ${e.dur.toFixed(2)}`).sort();
          assert.equal(shown.length, own.length);
          const names = (list: string[]) => list.map((text) => text.split(" ")[0]);
          assert.deepEqual(names(shown).sort(), own.map((s) => s.name.split(" ")[0]).sort());
          for (const e of events.filter((e) => e.ph === "X" && e.pid === rank)) {
            assert.ok(
              own.some((s) => s.name === e.name && Math.abs(s.start - origin - e.ts) < 0.002),
            );
          }
        });
      },
    ),
    { numRuns: 60 },
  );
});

/** Two all-to-alls of all ranks and one of ranks 1 and 2, in true time. */
function collectives(size: number): Span[][] {
  return Array.from({ length: size }, (_, rank) => {
    const one = (track: string, sequence: number, start: number, end: number): Span => ({
      track,
      name: "allToAllV",
      category: "allToAll",
      start: 5000 + start + rank,
      end: 5000 + end + rank * 2,
      args: { bytes: 64, sequence },
    });
    return [
      one("world", 0, 10, 60),
      { track: "compute", name: "gemm", category: "gemm", start: 5060 + rank, end: 5090 },
      one("world", 7, 100, 150),
      ...(rank === 1 || rank === 2 ? [one("world/split1.0", 0, 200, 250)] : []),
    ];
  });
}

Deno.test("arrows join the all-to-alls that belong together, forward in time", async () => {
  const size = 4;
  const events = await trace(collectives(size));
  checkFormat(events);
  const starts = events.filter((e) => e.ph === "s"), ends = events.filter((e) => e.ph === "f");
  assert.equal(starts.length, size * 2 + 2);
  assert.equal(new Set(starts.map((e) => e.id)).size, starts.length, "ids are unique");
  assert.deepEqual(starts.map((e) => e.id).sort(), ends.map((e) => e.id).sort());
  for (const s of starts) {
    const f = ends.find((e) => e.id === s.id)!;
    assert.equal(f.bp, "e");
    assert.notEqual(f.pid, s.pid);
    assert.ok(f.ts >= s.ts);
    for (const end of [s, f]) {
      // Perfetto hangs an arrow on the slice around its time.
      assert.ok(
        events.some((e) =>
          e.ph === "X" && e.cat === "allToAll" && e.pid === end.pid && e.tid === end.tid &&
          e.ts <= end.ts && end.ts <= e.ts + e.dur
        ),
      );
    }
  }
  const rows = events.filter((e) => e.name === "thread_name" && e.pid === 0)
    .map((e) => e.args?.name);
  assert.deepEqual(rows, ["all-to-all", "compute"]);
  assert.equal(
    events.find((e) => e.ph === "X" && e.cat === "allToAll")?.args?.communicator,
    "world",
  );
});

/** Micro-ops of steps: for each, when its gradient was ready, how long it waited and took; ns. */
const microOpsArbitrary = fc.array(
  fc.record({
    gradient: fc.nat(9),
    ready: fc.nat(30_000_000),
    parts: fc.array(fc.tuple(fc.nat(2_000_000), fc.oneof(fc.constant(0), fc.nat(900_000))), {
      minLength: 1,
      maxLength: 4,
    }),
  }),
  { maxLength: 20 },
).map((gradients) =>
  gradients.flatMap(({ gradient, ready, parts }, i) =>
    parts.map(([queued, dur], part): Span => ({
      track: "gradients",
      name: `layer ${gradient}.w${parts.length > 1 ? ` ${part * 10}..${part * 10 + 10}` : ""}`,
      category: gradient % 2 ? "allReduce" : "comm",
      start: 2e12 + (ready + queued) / 1000,
      end: 2e12 + (ready + queued + dur) / 1000,
      args: { bytes: 40, sequence: i, priority: i, queued_us: queued / 1000 },
    }))
  )
);

Deno.test("every micro-op has an arrow from its gradient's readiness, and counters say what waits", async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.tuple(microOpsArbitrary, fc.array(spanArbitrary, { maxLength: 5 })), {
        minLength: 1,
        maxLength: 3,
      }),
      async (ranks) => {
        const events = await trace(ranks.map(([microOps, others]) => [...others, ...microOps]));
        checkFormat(events);
        ranks.forEach(([microOps], pid) => {
          const own = events.filter((e) => e.pid === pid);
          const rows = new Map(
            own.filter((e) => e.name === "thread_name").map((e) => [e.tid, String(e.args!.name)]),
          );
          const on = (e: Event, row: string) => rows.get(e.tid)!.replace(/ \(\d+\)$/, "") === row;
          const shown = own.filter((e) => e.ph === "X" && on(e, "gradients"));
          assert.equal(shown.length, microOps.length);
          const ready = own.filter((e) => e.ph === "X" && on(e, "gradients ready"));
          const arrows = own.filter((e) => e.name === "gradient");
          assert.equal(arrows.length, 2 * microOps.length);
          for (const start of arrows.filter((e) => e.ph === "s")) {
            const from = ready.filter((e) => e.ts < start.ts && start.ts < e.ts + e.dur);
            assert.equal(from.length, 1, "moments do not overlap");
            const end = arrows.find((e) => e.ph === "f" && e.id === start.id)!;
            const to = shown.find((e) =>
              e.tid === end.tid && e.ts < end.ts && end.ts < e.ts + e.dur
            )!;
            const gradient = to.name.replace(/ \d+\.\.\d+$/, "");
            assert.ok(String(from[0].args!.gradients).split(", ").includes(gradient), to.name);
            // Within the 0.1 ms that views of one readiness may differ by.
            const at = to.ts - Number(to.args!.queued_us);
            assert.ok(Math.abs(at - from[0].ts) < 101, `${at} ${from[0].ts}`);
            assert.equal(typeof to.args!.priority, "number");
          }
          for (const [name, key] of [["micro-ops", "count"], ["gradients", "MB"]]) {
            const values = own.filter((e) => e.ph === "C" && e.name === `${name} waiting`);
            assert.equal(values.length > 0, microOps.length > 0);
            let last = -1;
            for (const { ts, args } of values) {
              assert.ok(ts > last && Number(args![key]) >= -1e-12);
              last = ts;
            }
            if (values.length > 0) assert.ok(Math.abs(Number(values.at(-1)!.args![key])) < 1e-12);
          }
        });
      },
    ),
    { numRuns: 60, endOnFailure: true },
  );
});

Deno.test("gradients that are ready together are one moment, with an arrow to each micro-op", async () => {
  const microOp = (name: string, queued: number, start: number, priority: number): Span => ({
    track: "gradients",
    name,
    category: "allReduce",
    start,
    end: start + 50,
    args: { bytes: 1_000_000, sequence: priority, priority, queued_us: queued },
  });
  const events = await trace([[
    microOp("a.weight 0..10", 0, 1000, 0),
    microOp("a.weight 10..20", 60, 1060, 1),
    microOp("b.bias", 119.5, 1120, 2),
    { track: "gpu", name: "gemm", category: "gemm", start: 900, end: 1000 },
  ]]);
  checkFormat(events);
  const ready = events.filter((e) => e.ph === "X" && e.name.startsWith("a.weight and"));
  assert.deepEqual(ready.map(({ ts, name, args }) => ({ ts, name, args })), [{
    ts: 100,
    name: "a.weight and 1 more",
    args: { gradients: "a.weight, b.bias", bytes: 3_000_000 },
  }]);
  assert.equal(events.filter((e) => e.ph === "s").length, 3);
  const counts = events.filter((e) => e.name === "micro-ops waiting")
    .map(({ ts, args }) => [ts, args!.count]);
  assert.deepEqual(counts, [[100, 2], [160, 1], [220, 0]]);
  const rows = events.filter((e) => e.name === "thread_name")
    .toSorted((a, b) => a.tid - b.tid).map((e) => e.args!.name);
  assert.deepEqual(rows, ["gpu", "gradients ready", "gradients"]);
});

Deno.test("arrows between all-to-alls are drawn only where every rank has recorded both ends", async () => {
  const own = collectives(3);
  own[1] = own[1].filter(({ args }) => args?.sequence !== 7); // rank 1 has stopped recording before
  const events = await trace(own);
  checkFormat(events);
  assert.equal(events.filter((e) => e.ph === "s").length, 3 + 2);
});

Deno.test("flowsOf() gives the arrows that writeTrace() draws", async () => {
  const own = collectives(4);
  const drawn = (await trace(own)).filter((e) => e.ph === "s" || e.ph === "f");
  const made = own.flatMap((spans, rank) => [
    ...traceEvents(spans, { rank, shift: -5010, flows: flowsOf(own, rank) }),
  ]).filter((e) => e.ph === "s" || e.ph === "f");
  assert.deepEqual(made, drawn);
});

Deno.test("a trace has no more spans than its limit: collectives first, then the longest", async () => {
  const span = (category: Category, start: number, dur: number): Span => ({
    track: "t",
    name: `${start}`,
    category,
    start,
    end: start + dur,
    ...(category === "allToAll" ? { args: { sequence: start } } : {}),
  });
  const spans = [
    span("compute", 0, 5),
    span("gemm", 10, 50),
    span("allToAll", 20, 1),
    span("wait", 30, 7),
    span("allReduce", 40, 2),
    span("allToAll", 50, 90),
  ];
  const names = (most: number) => keptSpans(spans, most).map(({ name }) => name).join(" ");
  assert.equal(names(6), "0 10 20 30 40 50");
  assert.equal(names(5), "10 20 30 40 50");
  assert.equal(names(4), "10 20 40 50");
  assert.equal(names(1), "20");
  const events = await trace([spans, spans.slice(0, 4)], [], 8);
  checkFormat(events);
  assert.deepEqual(
    [0, 1].map((pid) => events.filter((e) => e.ph === "X" && e.pid === pid).length),
    [
      4,
      4,
    ],
  );
});

Deno.test("clocks that differ are brought together", async () => {
  const skews = [0, 1e9, -3.5e6];
  const spans = collectives(3).map((own, rank) =>
    own.map((span) => ({
      ...span,
      start: span.start + skews[rank],
      end: span.end + skews[rank],
    }))
  );
  const events = await trace(spans, skews);
  checkFormat(events);
  const first = [0, 1, 2].map((rank) =>
    events.find((e) => e.ph === "X" && e.pid === rank && e.name === "allToAllV")!.ts
  );
  // In true time they begin 1 µs apart; a round trip in one process takes less than 20 ms.
  for (const ts of first) assert.ok(Math.abs(ts - first[0]) < 20_000, String(first));
});

Deno.test("clockOffset() takes the quickest round trip, and 0 where that fits", () => {
  const trip = (sent: number, remote: number, received: number) => ({ sent, remote, received });
  assert.equal(clockOffset([trip(0, 105, 10), trip(20, 190, 120)]), 100);
  assert.equal(clockOffset([trip(0, 9, 10), trip(20, 21, 30)]), 0);
  fc.assert(fc.property(
    fc.integer({ min: -1_000_000, max: 1_000_000 }),
    fc.array(fc.tuple(fc.nat(500), fc.nat(500)), { minLength: 1, maxLength: 20 }),
    (offset, delays) => {
      const trips = delays.map(([there, back], i) =>
        trip(i * 2000, i * 2000 + there + offset, i * 2000 + there + back)
      );
      const best = Math.min(...delays.map(([there, back]) => there + back));
      const error = Math.abs(clockOffset(trips) - offset);
      assert.ok(error <= best / 2 + 1e-6 || Math.abs(offset) <= best, String(error));
    },
  ));
});

Deno.test("processes of this host share now()", async () => {
  const url = new URL("./mod.ts", import.meta.url);
  const code = `import { now } from "${url}"; console.log(now());`;
  const before = now();
  const { stdout, success } = await new Deno.Command(Deno.execPath(), {
    args: ["eval", "--ext=ts", code],
  }).output();
  const after = now();
  assert.ok(success);
  const theirs = Number(new TextDecoder().decode(stdout));
  assert.ok(before <= theirs && theirs <= after, `${before} ${theirs} ${after}`);
});

Deno.test("a recorder keeps no more spans than its limit, and all totals", () => {
  const recorder = new Recorder();
  recorder.capturing = true;
  recorder.limit = 10;
  for (let i = 0; i < 25; i++) {
    recorder.record({ track: "t", name: "n", category: "io", start: i, end: i + 1 });
  }
  assert.deepEqual([recorder.spans.length, recorder.dropped, recorder.total("io")], [10, 15, 25]);
  recorder.clearSpans();
  assert.deepEqual([recorder.spans.length, recorder.dropped, recorder.total("io")], [0, 0, 25]);
});

Deno.test("a trace that cannot be written is an error on rank 0 and holds nobody up", async () => {
  const all = makeRanks(2);
  const recorder = new Recorder();
  const results = await Promise.allSettled(
    all.map((ranks) => writeTrace(`${folder}/absent/trace.json`, { ranks, recorder })),
  );
  assert.deepEqual(results.map((r) => r.status), ["rejected", "fulfilled"]);
  assert.match(
    (results[0] as PromiseRejectedResult).reason.message,
    /Cannot write the trace .*absent/,
  );
});

Deno.test("a large trace goes through in pieces", async () => {
  const own = Array.from({ length: 20_000 }, (_, i): Span => ({
    track: "compute",
    name: `kernel ${i % 50}`,
    category: "compute",
    start: i * 10,
    end: i * 10 + 8,
  }));
  const events = await trace([own, own]);
  assert.equal(events.filter((e) => e.ph === "X").length, 40_000);
  assert.equal(events.filter((e) => e.name === "thread_name").length, 2);
});
