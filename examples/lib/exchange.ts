// How train.ts sends tokens to other ranks: `--all-to-all direct`, `two-level` or `auto`. What the ways are is in collectives/two_level.ts, when
// two levels win in lina/training/levels.ts.

import { TwoLevel } from "../../collectives/two_level.ts";
import type { World } from "../../collectives/world.ts";
import { chooser } from "../../lina/training/levels.ts";
import { measureLevels } from "../../lina/training/measure_levels.ts";

/** What the flag may say. */
export const EXCHANGES = ["direct", "two-level", "auto"] as const;

/**
 * Opens the two levels, if they are wanted; with `auto` measures the links first. All ranks call it.
 *
 * @param way What the flag says.
 * @param world All ranks.
 * @param say Takes a line that tells what was found.
 * @returns The exchange, for the model's option; dispose of it. Null for the direct way.
 */
export async function openExchange(
  way: typeof EXCHANGES[number],
  world: World,
  say: (line: string) => void,
): Promise<TwoLevel | null> {
  if (way === "direct") return null;
  const two = await TwoLevel.create(world);
  if (two.levels === null) {
    say(`all-to-alls are direct: ${two.reason}`);
    return two;
  }
  if (way === "two-level") {
    say(`all-to-alls on two levels: ${two.reason}`);
    return two;
  }
  const links = await measureLevels(world, two, world.device);
  two.choose = chooser(links!, two.levels);
  const { inner, outer, samples } = links!;
  const wins = samples.filter(({ direct_us, twoLevel_us }) => twoLevel_us < 0.95 * direct_us);
  const sizes = wins.map(({ bytes }) => `${bytes / 1024} KiB`).join(", ");
  say(
    `all-to-alls: ${two.reason}, ${inner.alpha_us.toFixed(0)} µs a message inside and ${
      outer.alpha_us.toFixed(0)
    } µs between; two levels win at ${sizes || "no size that was measured"}`,
  );
  return two;
}
