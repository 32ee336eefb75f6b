import assert from "node:assert/strict";
import { emulated, testDevice } from "../../tests/emulator/device.ts";
import { now, recorder } from "../../trace/mod.ts";
import * as ops from "../ops.ts";
import { zeros } from "../tensor.ts";
import { DeviceTrace } from "./trace.ts";

const device = await testDevice();

Deno.test({
  name: "device trace: kernels become spans of the GPU's own times, in order, on the host's clock",
  ignore: device === null,
  async fn() {
    const kernels = device!.kernels, before = recorder.spans.length;
    using x = zeros(device!, [64, 64]),
      y = zeros(device!, [64, 64]),
      out = zeros(device!, [64, 64]);
    const trace = new DeviceTrace(device!);
    const began = now();
    trace.begin();
    ops.add(x, y, out);
    ops.gemm(x, y, out);
    await trace.end();
    const ended = now();
    assert.equal(device!.kernels, kernels);
    ops.add(x, y, out); // is not timed any more
    await trace.end();
    const spans = recorder.spans.slice(before).filter(({ track }) => track === "gpu");
    assert.deepEqual(spans.map(({ name, category }) => [name, category]), [
      ["add", "compute"],
      ["gemm", "gemm"],
    ]);
    const slack = emulated ? 1000 : 100; // µs
    let last = began - slack;
    for (const { start, end } of spans) {
      assert(last <= start + slack && start <= end && end <= ended + slack);
      last = end;
    }
  },
});
