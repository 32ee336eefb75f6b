// Spans of a GPU's own times in the trace of a rank: while it is on, timed events surround every kernel call, and their times, which are
// on the host's clock, become spans of the row `gpu`. Costs host time, so it is on for the few steps that are recorded.

import { recorder } from "../../trace/mod.ts";
import type { CudaDevice } from "./device.ts";
import type { CudaEvent } from "./streams.ts";

interface Pending {
  readonly name: string;
  readonly start: CudaEvent;
  readonly end: CudaEvent;
}

/** Times the kernels of a device. */
export class DeviceTrace {
  readonly #device: CudaDevice;
  readonly #pending: Pending[] = [];

  /**
   * Prepares the trace; nothing is timed yet.
   *
   * @param device The GPU.
   */
  constructor(device: CudaDevice) {
    this.#device = device;
  }

  /** Times every kernel from now on. */
  begin(): void {
    const device = this.#device;
    device.anchor();
    const { kernels, routing } = device;
    Object.defineProperty(device, "kernels", { configurable: true, value: this.#around(kernels) });
    Object.defineProperty(device, "routing", { configurable: true, value: this.#around(routing) });
  }

  /** Ends the timing, waits for the device and gives the recorder the spans. */
  async end(): Promise<void> {
    // What begin() has put before the class's own getters.
    Reflect.deleteProperty(this.#device, "kernels");
    Reflect.deleteProperty(this.#device, "routing");
    await this.#device.stream.synchronize();
    for (const { name, start, end } of this.#pending.splice(0)) {
      if (!start.done() || !end.done() || recorder.spans.length >= recorder.limit) continue;
      const category = /gemm/i.test(name) ? "gemm" : "compute";
      // Not by record(): totals count the host's spans of the same kernels.
      recorder.spans.push({ track: "gpu", name, category, start: start.time(), end: end.time() });
    }
  }

  #around<T extends object>(kernels: T): T {
    const timed: Record<string, unknown> = {};
    for (const [name, kernel] of Object.entries(kernels)) {
      timed[name] = (...args: unknown[]) => {
        const start = this.#device.stream.recordTimed();
        const result = kernel.apply(kernels, args);
        this.#pending.push({ name, start, end: this.#device.stream.recordTimed() });
        return result;
      };
    }
    return timed as T;
  }
}
