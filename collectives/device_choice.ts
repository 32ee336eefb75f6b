// Which device a rank's tensors live on. All ranks must agree, because a job runs on GPUs only if every rank gets one of its own (or they
// were told to share): each tells the others what it found, and the same rule then decides everywhere. CUDA is loaded only where a GPU
// may be used, so that a rank on a CPU starts without it.

import type { BackendChoice, DeviceChoice, RankEnvironment } from "./rendezvous/environment.ts";
import { machineIdentity } from "./rendezvous/host.ts";
import type { BootContext } from "./transport.ts";

/** Why a machine without NVIDIA devices has no GPU for us. */
export const NO_GPU: string =
  "no NVIDIA GPU is in this machine, or its driver is not loaded (nvidia-smi must list one)";
/** The vendor of a PCI device. */
const NVIDIA = "0x10de";

/** What a rank has found on its machine. */
export interface DeviceRecord {
  /** The GPU that it would use, by a name that no other GPU of any host has; null if it has none. */
  readonly gpu: string | null;
  /** Why it has none, as half a sentence; "" if it has one. */
  readonly reason: string;
}

/** What a job decides. */
export interface DeviceDecision {
  /** Where tensors live. */
  readonly kind: "cpu" | "cuda";
  /** Why, as half a sentence. */
  readonly reason: string;
  /** Ranks that share a GPU with a rank before them. */
  readonly sharing: readonly number[];
  /** Whether the CPU was chosen although some rank has a GPU. */
  readonly unused?: true;
}

/** How a rank looks for its GPU; tests bring their own. */
export type FindGpu = (env: RankEnvironment) => Promise<DeviceRecord>;

/**
 * The rule: CUDA if every rank has a GPU of its own, or shares one by wish.
 *
 * @param records What the ranks have found, in rank order.
 * @param share Whether several ranks may use one GPU.
 * @returns The decision, the same on every rank.
 */
export function decide(records: readonly DeviceRecord[], share: boolean): DeviceDecision {
  const without = records.findIndex(({ gpu }) => gpu === null);
  if (without >= 0) {
    const who = records.length === 1 ? "" : `rank ${without}: `;
    const some = records.some(({ gpu }) => gpu !== null);
    const decision = {
      kind: "cpu",
      reason: `${who}${records[without].reason}`,
      sharing: [],
    } as const;
    return some ? { ...decision, unused: true } : decision;
  }
  const firstOn = new Map<string, number>();
  const sharing: number[] = [];
  records.forEach(({ gpu }, rank) => {
    if (firstOn.has(gpu!)) sharing.push(rank);
    else firstOn.set(gpu!, rank);
  });
  if (sharing.length === 0) {
    const reason = records.length === 1 ? "there is a GPU" : "every rank has a GPU of its own";
    return { kind: "cuda", reason, sharing };
  }
  if (share) return { kind: "cuda", reason: "ranks share a GPU by wish", sharing };
  const [rank] = sharing;
  const reason =
    `${firstOn.size} GPUs are not enough for ${records.length} ranks (rank ${rank} would share that of rank ${
      firstOn.get(records[rank].gpu!)
    }; --share-gpu allows it)`;
  const text = reason.replace(/^1 GPUs are/, "1 GPU is");
  return { kind: "cpu", reason: text, sharing, unused: true };
}

/**
 * One line for people: why a job computes on processors where there is a GPU, or that GPUs are shared. Where there is none, nobody asks.
 *
 * @param decision What was decided.
 * @param wish What was asked for.
 * @param hardware Whether there is NVIDIA hardware in this machine.
 * @returns The line, or null.
 */
export function noteOf(
  { kind, reason, sharing, unused }: DeviceDecision,
  wish: DeviceWish,
  hardware: () => boolean = hasNvidiaHardware,
): string | null {
  if (sharing.length > 0 && kind === "cuda") {
    return "lina: ranks share a GPU, which is for testing: NCCL then connects them by sockets";
  }
  if (kind === "cuda" || wish.device !== "auto" || wish.backend !== "auto") return null;
  return unused || hardware()
    ? `lina: the CPU is used, as ${reason.replace(/\s*\n\s*/g, " ")}`
    : null;
}

/**
 * The GPU that a rank sees, as CUDA_VISIBLE_DEVICES names it: one for each rank where there are enough of them.
 *
 * @param visible CUDA_VISIBLE_DEVICES as it is.
 * @param gpus GPUs of the host.
 * @param ranks Ranks on it.
 * @param localRank The rank's number among them.
 * @param share Whether several ranks may use one GPU.
 * @returns The new value; null leaves things as they are.
 */
export function gpuOf(
  visible: string | undefined,
  gpus: number,
  ranks: number,
  localRank: number,
  share: boolean,
): string | null {
  const list = visible === undefined
    ? Array.from({ length: gpus }, (_, i) => `${i}`)
    : visible.split(",").map((name) => name.trim()).filter((name) => name !== "");
  if (list.length >= ranks) return list[localRank];
  return share && list.length > 0 ? list[localRank % list.length] : null;
}

/**
 * Counts the GPUs of this host without opening the driver.
 *
 * @returns Number of NVIDIA devices.
 */
export function countGpus(): number {
  try {
    let count = 0;
    let windows = false; // Linux on Windows shows one device, whatever the GPUs
    for (const { name } of Deno.readDirSync("/dev")) {
      if (/^nvidia\d+$/.test(name)) count++;
      if (name === "dxg") windows = true;
    }
    return count === 0 && windows ? 1 : count;
  } catch {
    return 0;
  }
}

/**
 * Whether there is NVIDIA hardware in this machine, be its driver installed or not: then a person wants to know why it is not used.
 *
 * @returns False if there is none, as far as the system tells.
 */
export function hasNvidiaHardware(): boolean {
  if (countGpus() > 0) return true;
  const folder = "/sys/bus/pci/devices";
  try {
    for (const { name } of Deno.readDirSync(folder)) {
      const is = (file: string) => Deno.readTextFileSync(`${folder}/${name}/${file}`).trim();
      if (is("vendor") === NVIDIA && is("class").startsWith("0x03")) return true;
    }
  } catch { /* no such folder but on Linux */ }
  return false;
}

/** What decides beside the machine. */
export interface DeviceWish {
  /** The device asked for. */
  readonly device: DeviceChoice;
  /** The backend asked for. */
  readonly backend: BackendChoice;
}

/**
 * Decides where the tensors of all ranks live; every rank calls it.
 *
 * @param env This rank.
 * @param wish What was asked for, by all ranks alike.
 * @param context Where the ranks tell each other.
 * @param find How to look for a GPU.
 * @returns The decision.
 * @throws {Error} If GPUs were asked for and cannot be used; the message says why.
 */
export async function chooseDevice(
  env: RankEnvironment,
  wish: DeviceWish,
  context: Pick<BootContext, "store" | "timeout_ms">,
  find: FindGpu = findGpu,
): Promise<DeviceDecision> {
  const onCpu = (reason: string): DeviceDecision => ({ kind: "cpu", reason, sharing: [] });
  const { device, backend } = wish;
  const required = device === "cuda" || backend === "nccl";
  if (device === "cpu" && backend === "nccl") {
    throw new Error(
      "Cannot use backend nccl as the device must be a GPU: current value is cpu; leave out --device, or use --backend auto",
    );
  }
  if (device === "cuda" && (backend === "shm" || backend === "mpi") && env.size > 1) {
    throw new Error(
      `Cannot use backend ${backend} as the tensors of a GPU must travel by nccl: current value is --device cuda; use --backend auto, or --device cpu`,
    );
  }
  if (device === "cpu") return onCpu("it was asked for");
  if (!required && backend !== "auto") return onCpu(`backend ${backend} works on it`);
  if (!required && env.gpus === 0 && env.oneHost) return onCpu(NO_GPU);
  const records = await exchange(env, context, await find(env));
  const decision = records === null
    ? onCpu(`${env.source} has named no rendezvous: set MASTER_ADDR`)
    : decide(records, env.shareGpu);
  if (required && decision.kind === "cpu") {
    const [what, otherwise] = device === "cuda"
      ? ["device cuda", "--device auto, or cpu,"]
      : ["backend nccl", "--backend auto"];
    throw new Error(
      `Cannot use ${what} as every rank must have a GPU (${otherwise} does without): current value is: ${decision.reason}`,
    );
  }
  return decision;
}

/** The records of all ranks; null if they have no place to tell each other. */
async function exchange(
  env: RankEnvironment,
  { store, timeout_ms }: Pick<BootContext, "store" | "timeout_ms">,
  mine: DeviceRecord,
): Promise<DeviceRecord[] | null> {
  if (env.size === 1) return [mine];
  if (env.store === null) return null;
  await store.set(`device/${env.rank}`, new TextEncoder().encode(JSON.stringify(mine)));
  const texts = await Promise.all(
    Array.from({ length: env.size }, (_, rank) => store.get(`device/${rank}`, timeout_ms)),
  );
  return texts.map((text) => JSON.parse(new TextDecoder().decode(text)) as DeviceRecord);
}

/** This rank's GPU, made the only one that this process sees. */
async function findGpu(env: RankEnvironment): Promise<DeviceRecord> {
  const no = (reason: string): DeviceRecord => ({ gpu: null, reason });
  const gpus = env.gpus ?? countGpus();
  if (gpus === 0 && !Deno.env.has("LINA_CUDART")) return no(NO_GPU);
  // Before CUDA is loaded: it reads the variable once. Calls off the main thread then use this GPU, too, being the first of one.
  const visible = Deno.env.get("CUDA_VISIBLE_DEVICES");
  const { localSize, localRank, shareGpu } = env;
  if (env.gpus === null) { // our launcher has done it
    const mine = gpuOf(visible, gpus, localSize, localRank, shareGpu);
    if (mine !== null) Deno.env.set("CUDA_VISIBLE_DEVICES", mine);
  }
  if (shareGpu && env.size > 1 && !Deno.env.has("NCCL_HOSTID")) {
    Deno.env.set("NCCL_HOSTID", `lina-rank${env.rank}`); // NCCL takes no GPU twice on one host
  }
  const { findCuda } = await import("../tensor/cuda/device.ts");
  const found = findCuda();
  if (!found.ok) return no(found.reason);
  if (env.size > 1) {
    const { whyNoNccl } = await import("./nccl/connect.ts");
    const reason = whyNoNccl();
    if (reason !== null) return no(reason);
  }
  const { pciBusId } = await import("../ffi/cudart.ts");
  return { gpu: `${machineIdentity()} ${pciBusId(0)}`, reason: "" };
}
