// Tables of tensors on the device when memory or an upload fails half way: what they held before must not be found again.

import assert from "node:assert/strict";
import { testDevice } from "../../tests/emulator/device.ts";
import { fromArray, zeros } from "../tensor.ts";
import type { CudaContext } from "./context.ts";
import { optimizerKernels, optimizerModule } from "./optimizer.ts";

const device = await testDevice([optimizerModule]);

for (const failing of ["allocate", "upload"] as const) {
  Deno.test({
    name: `a table whose ${failing} failed is made again, and so is the list that it held before`,
    ignore: !device,
    async fn() {
      let fails = false;
      const { context } = device!;
      const broken: CudaContext = {
        ...context,
        has: (module) => context.has(module),
        [failing]: (...values: [never, never]) => {
          if (fails) throw new Error("no more");
          return context[failing](...values);
        },
      };
      const { sumSquares } = optimizerKernels(broken);
      const xs = Array.from({ length: 40 }, (_, i) => fromArray(device!, new Float32Array([i])));
      using out = zeros(device!, [1], "f64");
      const sum = async (...list: typeof xs) => {
        device!.kernels.fill(out, 0);
        sumSquares(list, out);
        return Number((await out.toArray())[0]);
      };
      // As many lists as there are tables.
      for (let i = 0; i < 16; i++) assert.equal(await sum(xs[i]), i * i);
      fails = true;
      await assert.rejects(() => sum(...xs.slice(16)), /no more/); // would take the place of xs[0]
      fails = false;
      const other = fromArray(device!, new Float32Array(100)); // may get the memory of its table
      assert.equal(await sum(xs[2]), 4);
      assert.equal(await sum(xs[0]), 0);
      assert.equal(await sum(xs[1]), 1);
      assert.equal(await sum(xs[3], xs[4]), 25);
      for (const x of [...xs, other]) x[Symbol.dispose]();
    },
  });
}
