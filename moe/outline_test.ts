// The model's outline: alike on all ranks, with one gradient per seat where replicas are regular, and none of experts elsewhere.

import assert from "node:assert/strict";
import { cpuDevice } from "../tensor/cpu/device.ts";
import { bytesOf } from "../tensor/dtype.ts";
import { loopbackWorld } from "../tests/_loopback.ts";
import { modelConfig } from "./config.ts";
import { buildStepGraph, type StepOutline } from "./graph.ts";
import type { ExpertPlacement } from "./hooks.ts";
import { replicatedPlacement, staticPlacement } from "./placement.ts";
import { Transformer } from "./transformer.ts";

const SIZES = { vocab: 16, width: 8, layers: 3, heads: 2, headDim: 4, hidden: 6, denseLayers: 1 };

/** Outlines of a model on some ranks, once experts sit as placements say, one after another. */
async function outlines(
  ranks: number,
  experts: number,
  placements: readonly ExpertPlacement[],
): Promise<StepOutline[]> {
  const config = modelConfig({ ...SIZES, experts, router: { kind: "softmax", topK: 2 } });
  const all = await loopbackWorld(ranks).run(async (comm) => {
    using model = new Transformer({ device: cpuDevice(), comm, config, seed: 1 });
    const own: StepOutline[] = [];
    for (const placement of placements) {
      await model.moveExperts(placement);
      const outline = model.outline(30, ranks);
      own.push(outline);
      outline.layers.forEach(({ moe }, layer) => {
        assert.equal(moe === undefined, layer === 0);
        if (!moe || moe.experts.length === 0) return;
        const { store } = model.moeLayers[layer - 1];
        assert.deepEqual(
          moe.experts.map(({ elements, elementBytes }) => [elements, elementBytes]),
          store.seatGradients.map(({ size, dtype }) => [size, bytesOf(dtype)]),
        );
      });
    }
    return own;
  });
  for (const own of all) assert.deepEqual(own, all[0], "alike on all ranks");
  return all[0];
}

Deno.test("regular replicas have one gradient per seat, and rows stay in their group", async () => {
  const [alone, twice, whole, back] = await outlines(4, 4, [
    staticPlacement(),
    replicatedPlacement(2),
    replicatedPlacement(4),
    staticPlacement(),
  ]);
  assert.deepEqual(back, alone);
  const of = ({ layers }: StepOutline) => layers[2].moe!;
  assert.deepEqual(of(alone).experts, []);
  assert.deepEqual(
    of(twice).experts,
    [0, 1].map((seat) => ({
      name: `model.layers.2.block_sparse_moe.seats.${seat}`,
      elements: 3 * 6 * 8,
      elementBytes: 4,
      group: "replicas",
    })),
  );
  assert.equal(of(whole).experts.length, 4);
  const row_bytes = 30 * 2 * 8 * 4; // choices of 30 rows
  assert.deepEqual(
    [alone, twice, whole].map((outline) => of(outline).allToAllBytes),
    [row_bytes * 3 / 4, row_bytes / 2, 0],
  );
  const { nodes } = buildStepGraph(twice);
  assert.equal(nodes.filter((n) => n.kind === "gradient" && n.group === "replicas").length, 4);
});

Deno.test("irregular replicas have no gradients in the outline", async () => {
  // Three ranks of a group hold two, two and three of seven experts.
  const [six] = await outlines(6, 7, [replicatedPlacement(2)]);
  assert.deepEqual(six.layers[1].moe!.experts, []);
});
