// The CPU as a device: its tensors live in the linear memory of `memory.ts`, and work is done when a call returns, so its
// one stream and its events have nothing to wait for.

import type { TypedArray } from "../dtype.ts";
import type { Device, HostMemory, MemoryStats, Stream, StreamEvent } from "../device.ts";
import type { Tensor } from "../tensor.ts";
import { now } from "../../trace/mod.ts";
import { allocate, free, heapStats, linearBuffer, resetPeak } from "./memory.ts";
import { cpuKernels } from "./kernels.ts";
import { hostView } from "./view.ts";

export { hostView } from "./view.ts";

/** A point that has been passed already. */
class HostEvent implements StreamEvent {
  #time = now();
  done(): boolean {
    return true;
  }
  time(): number {
    return this.#time;
  }
}

const hostStream: Stream = {
  name: "compute",
  record: () => new HostEvent(),
  wait: () => {},
  synchronize: () => Promise.resolve(),
};

function write(source: TypedArray, target: Tensor): void {
  if (source.length !== target.size) {
    throw new RangeError(
      `Cannot write as the array must have ${target.size} elements: current value is ${source.length}`,
    );
  }
  const view = hostView(target);
  if (source.constructor !== view.constructor) {
    throw new TypeError(
      `Cannot write as the array must be a ${view.constructor.name} for ${target.dtype}: current value is ${source.constructor.name}`,
    );
  }
  (view as Float32Array).set(source as Float32Array);
}

function memory(): MemoryStats {
  const { used, reserved, peak, free } = heapStats();
  return { used_bytes: used, reserved_bytes: reserved, peak_bytes: peak, free_bytes: free };
}

/** Memory beside that of the tensors. */
function hostMemory(bytes: number): HostMemory {
  const buffer = new ArrayBuffer(bytes);
  const copy = (to: Uint8Array, from: Uint8Array) => to.set(from);
  const bytesOfTensor = ({ address, bytes }: Tensor) =>
    new Uint8Array(linearBuffer(), address, bytes);
  const bytesAt = (offset: number, size: number) => new Uint8Array(buffer, offset, size);
  return {
    buffer,
    load: (offset, target) => copy(bytesOfTensor(target), bytesAt(offset, target.bytes)),
    store: (source, offset) => copy(bytesAt(offset, source.bytes), bytesOfTensor(source)),
    [Symbol.dispose]: () => {}, // once nobody refers to it
  };
}

/** The processor's model where the system says it in a file (importing node:os would double the time that a rank takes to start). */
function processorName(): string {
  try {
    const model = /^model name\s*:\s*(.+)$/m.exec(Deno.readTextFileSync("/proc/cpuinfo"))?.[1];
    return model?.trim() || Deno.build.arch;
  } catch {
    return Deno.build.arch;
  }
}

let device: Device | undefined;

/**
 * The CPU of this process.
 *
 * @returns The one CPU device; tensors on it share its linear memory.
 */
export function cpuDevice(): Device {
  return device ??= {
    kind: "cpu",
    get name() {
      return processorName();
    },
    stream: hostStream,
    kernels: cpuKernels,
    routing: null,
    allocate,
    free,
    write,
    read: (source) => Promise.resolve(hostView(source).slice()),
    memory,
    resetPeak,
    createStream: () => hostStream,
    hostMemory,
  };
}
