import assert from "node:assert/strict";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { DTYPES } from "../tensor/dtype.ts";
import {
  createFusedParameters,
  createParameter,
  freeParameter,
  gradientDtype,
} from "./parameter.ts";

const device = cpuDevice();

Deno.test("gradients: f32 unless the weights are f64, or narrow weights' own type is chosen", async () => {
  for (const dtype of ["f32", "f64", "bf16", "f16"] as const) {
    const wide = dtype === "f64" ? "f64" : "f32";
    assert.equal(gradientDtype(dtype), wide);
    for (const chosen of DTYPES) {
      if (chosen === wide || chosen === dtype) {
        assert.equal(gradientDtype(dtype, chosen), chosen);
        const weights = createParameter(device, "w", {
          shape: [3, 5],
          dtype,
          gradientDtype: chosen,
          init: { std: 1, seed: 1 },
        });
        assert.equal(weights.value.dtype, dtype);
        assert.equal(weights.grad.dtype, chosen);
        assert((await weights.grad.toArray() as Float32Array).every((x) => x === 0));
        freeParameter(weights);
      } else {
        assert.throws(
          () => gradientDtype(dtype, chosen),
          /Cannot make parameters as "gradientDtype" must be/,
        );
      }
    }
  }
  assert.throws(
    () => gradientDtype("bf16", "f16"),
    /must be f32 or bf16 for bf16 weights: current value is f16/,
  );
  assert.throws(
    () => gradientDtype("f32", "bf16"),
    /must be f32 for f32 weights: current value is bf16/,
  );
});

Deno.test("gradients of fused parameters are rows of one, in the chosen type", () => {
  const { whole, parts } = createFusedParameters(
    device,
    [{ name: "a", rows: 2 }, { name: "b", rows: 3 }],
    { columns: 4, dtype: "bf16", gradientDtype: "bf16", init: { std: 1, seed: 1 } },
  );
  assert.deepEqual(parts.map(({ grad }) => grad.dtype), ["bf16", "bf16"]);
  assert.equal(parts[1].grad.address, whole.grad.address + 2 * 4 * 2);
  freeParameter(whole);
});
