// A MoE layer's options with the defaults filled in, and checked.

import type { MoeLayerOptions } from "./moe_types.ts";
import { gradientDtype } from "./parameter.ts";
import { staticPlacement } from "./placement.ts";

/**
 * Fills in the defaults of a layer's options.
 *
 * @param options What was given.
 * @returns All options.
 * @throws {RangeError} If a size is no size.
 */
export function layerOptions(options: MoeLayerOptions): Required<MoeLayerOptions> {
  const initStd = options.initStd ?? 0.02;
  const all: Required<MoeLayerOptions> = {
    activation: "swiglu",
    sharedExperts: 0,
    placement: staticPlacement(),
    exchange: null,
    recompute: false,
    seed: 0,
    downStd: initStd,
    dtype: "f32",
    gradientDtype: gradientDtype(options.dtype ?? "f32"),
    ...options,
    initStd,
  };
  for (const name of ["width", "hidden", "experts"] as const) checkSize(name, all[name], 1);
  checkSize("sharedExperts", all.sharedExperts, 0);
  return all;
}

function checkSize(name: string, value: number, least: number): void {
  if (!Number.isSafeInteger(value) || value < least) {
    throw new RangeError(
      `Cannot make a MoE layer as ${name} must be a whole number >= ${least}: current value is ${value}`,
    );
  }
}
