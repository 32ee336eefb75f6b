import assert from "node:assert/strict";
import fc from "fast-check";
import { type LossRow, lossSvg } from "./loss_svg.ts";
import { Progress, type ProgressOptions } from "./progress.ts";
import { formatBytes, formatTable } from "./table.ts";

/** Checks that a text is XML with elements closed in order, and returns its numbers. */
function parseSvg(svg: string): number[] {
  const open: string[] = [];
  const numbers: number[] = [];
  const rest = svg.replace(
    /<(\/?)([a-z]+)((?:\s+[a-zA-Z0-9-]+="[^"<]*")*)\s*(\/?)>/g,
    (_, closing: string, name: string, attributes: string, empty: string) => {
      if (closing) assert.equal(open.pop(), name);
      else if (!empty) open.push(name);
      for (const [, value] of attributes.matchAll(/\s(?:[xy][12]?|c[xy])="([^"]*)"/g)) {
        numbers.push(Number(value));
      }
      for (const [, d] of attributes.matchAll(/\sd="([^"]*)"/g)) {
        numbers.push(...d.split(/[ML ]/).filter(Boolean).map(Number));
      }
      return "";
    },
  );
  assert.deepEqual(open, []);
  assert.ok(!/[<>]/.test(rest), rest.slice(0, 200));
  assert.ok(!/&(?!#\d+;)/.test(svg), "only numeric entities");
  return numbers;
}

const loss = fc.oneof(fc.double(), fc.double({ min: 0, max: 12, noNaN: true }), fc.constant(2));

Deno.test("lossSvg() draws any run inside its frame", () => {
  const rows = fc.array(
    fc.record({ loss, val_loss: fc.option(loss, { nil: undefined }) }, { requiredKeys: [] }),
    { maxLength: 60 },
  ).map((list) => list.map((row, i): LossRow => ({ step: 3 + i * 7, ...row })));
  const label = fc.oneof(fc.string(), fc.constantFrom("\u0000\u0001", "é漢 <&>\"'"));
  fc.assert(fc.property(rows, label, loss, (rows, label, baseline) => {
    const bounded = rows.map((row) => ({
      ...row,
      loss: Math.abs(row.loss ?? 0) > 1e15 ? undefined : row.loss,
      val_loss: Math.abs(row.val_loss ?? 0) > 1e15 ? undefined : row.val_loss,
    }));
    const line = Math.abs(baseline) > 1e15 ? 1 : baseline;
    const svg = lossSvg(bounded, { title: label, baseline: { label: "bigram", loss: line } });
    for (const number of parseSvg(svg)) {
      assert.ok(number >= -1 && number <= 961, `${number} is outside the picture`);
    }
  }));
});

Deno.test("lossSvg() shows a long run with few points, its extremes among them", () => {
  const rows = Array.from({ length: 200_000 }, (_, i) => ({
    step: i,
    loss: 5 * Math.exp(-i / 20_000) + (i === 150_000 ? 3 : 0),
  }));
  const svg = lossSvg(rows);
  assert.ok(svg.length < 200_000, `${svg.length} characters`);
  const ys = parseSvg(svg);
  assert.ok(ys.every(Number.isFinite));
});

Deno.test("lossSvg() shows the last values and the baseline", () => {
  const svg = lossSvg([{ step: 1, loss: 4 }, { step: 2, loss: 4, val_loss: 3.25 }], {
    baseline: { label: "bigram <b>", loss: 2.5 },
  });
  for (const text of ["4.000 train", "3.250 val", "2.500 baseline", "bigram &#60;b&#62;"]) {
    assert.ok(svg.includes(text), text);
  }
});

/** A progress bar with a clock of its own. */
function recorded(total: number, options: ProgressOptions) {
  let text = "", time = 0;
  const progress = new Progress(total, {
    write: (piece) => void (text += piece),
    clock: () => time,
    ...options,
  });
  return {
    progress,
    pass: (ms: number) => void (time += ms),
    take: () => {
      const taken = text;
      text = "";
      return taken;
    },
  };
}

Deno.test("Progress redraws one line on a terminal and never wraps it", () => {
  fc.assert(fc.property(
    fc.integer({ min: 1, max: 200 }),
    fc.nat(100_000),
    fc.nat(120_000),
    (columns, total, step) => {
      const { progress, pass, take } = recorded(total, { columns });
      pass(1000);
      const more = { tokens_per_s: 1234567, a2a_share: 0.333, load_imbalance: 1.5, val_loss: 2 };
      progress.update({ step, loss: 2.5, ...more });
      const line = take();
      assert.ok(line.startsWith("\r") && line.endsWith("\x1b[K") && !line.includes("\n"));
      // deno-lint-ignore no-control-regex -- the codes of a terminal
      const shown = line.replace(/\x1b\[[0-9;]*[a-zA-Z]|\r/g, "");
      assert.ok(shown.length <= Math.max(0, columns - 1), `${shown.length} > ${columns}: ${shown}`);
    },
  ));
});

Deno.test("Progress keeps loss and time where there is little room", () => {
  const schedule = "lina, 2 slices";
  const more = { tokens_per_s: 1234567, a2a_share: 0.333, load_imbalance: 1.5, val_loss: 2 };
  const lines = [64, 200].map((columns) => {
    const { progress, pass, take } = recorded(100, { columns });
    pass(1000);
    progress.update({ step: 50, loss: 2.5, ...more, schedule });
    const line = take();
    assert.ok(line.includes("loss 2.500") && line.includes("0:01 left"), line);
    return line;
  });
  assert.ok(!lines[0].includes("load") && !lines[0].includes(schedule), lines[0]);
  assert.ok(lines[1].includes(schedule), lines[1]);
});

Deno.test("Progress prints a line every few seconds elsewhere, and the last one", () => {
  const { progress, pass, take } = recorded(100, { columns: 0, interval_ms: 5000 });
  for (let step = 1; step <= 99; step++) {
    pass(100);
    progress.update({ step, loss: 3 - step / 100, tokens_per_s: 12_345, a2a_share: 0.25 });
  }
  const lines = take().trimEnd().split("\n");
  assert.equal(lines.length, 2); // at 0.1 s and 5.1 s
  assert.equal(
    lines[1],
    " 51%  step  51/100  loss 2.490  12.3k tokens/s  all-to-all 25%  0:05 left",
  );
  pass(100);
  progress.update({ step: 100, val_loss: 1.5 });
  assert.match(take(), /^100% {2}step 100\/100 {2}loss 2\.010 {2}val 1\.500.* 0:10 total\n$/);
  progress.finish();
  assert.equal(take(), "");
});

Deno.test("Progress puts messages above the bar, and says nothing on other ranks", () => {
  const { progress, take } = recorded(10, { columns: 80 });
  progress.update({ step: 1, loss: 2 });
  take();
  progress.message("saved");
  assert.ok(take().startsWith("\r\x1b[Ksaved\n\r"));
  progress.finish();
  assert.equal(take(), "\n");
  const silent = recorded(10, { columns: 80, rank: 1 });
  silent.progress.update({ step: 10, loss: 2 });
  silent.progress.message("saved");
  silent.progress.finish();
  assert.equal(silent.take(), "");
});

Deno.test("Progress draws a bar for a launcher that has a terminal", () => {
  const before = Deno.env.get("LINA_COLUMNS");
  Deno.env.set("LINA_COLUMNS", "40");
  try {
    const { progress, take } = recorded(10, {});
    progress.update({ step: 1, loss: 2 });
    assert.ok(take().startsWith("\r"));
  } finally {
    if (before === undefined) Deno.env.delete("LINA_COLUMNS");
    else Deno.env.set("LINA_COLUMNS", before);
  }
});

Deno.test("a resumed run's time left counts from where it began", () => {
  const { progress, pass, take } = recorded(100, { columns: 0, start: 80 });
  pass(10_000);
  progress.update({ step: 90 });
  assert.match(take(), /0:10 left/);
});

Deno.test("formatTable() aligns and marks what is absent", () => {
  const rows = [{ name: "a|b", ms: 1.5, n: 10 }, { name: "c", n: 7 }];
  assert.equal(
    formatTable(rows, { columns: ["name", { key: "ms", label: "time_ms", digits: 1 }, "n"] }),
    "name  time_ms   n\n----  -------  --\na|b       1.5  10\nc           –   7",
  );
  assert.equal(
    formatTable(rows, { columns: ["name", "n"], markdown: true }),
    "| name |   n |\n| ---- | --: |\n| a\\|b |  10 |\n| c    |   7 |",
  );
  assert.equal(formatTable([]), "\n");
  fc.assert(fc.property(
    fc.array(fc.record({ a: fc.string(), b: fc.double() }), { minLength: 1 }),
    (rows) => {
      const clean = rows.map((row) => ({ ...row, a: row.a.replace(/[^!-~]/g, "x") + "!" }));
      const lines = formatTable(clean).split("\n");
      assert.equal(lines.length, rows.length + 2);
      const widths = new Set(lines.map((line) => line.length));
      assert.equal(widths.size, 1, "the last column is to the right: all lines end together");
    },
  ));
});

Deno.test("formatBytes() uses powers of 1000", () => {
  assert.deepEqual(
    [0, 999, 1000, 999_960, 2_026_246, 5e12].map(formatBytes),
    ["0 B", "999 B", "1.0 kB", "1.0 MB", "2.0 MB", "5.0 TB"],
  );
});
