// What the launchers of several nodes tell each other, through the store of node 0: that a rank has failed, that all ranks of a
// node are done, that a node is ready for another attempt. A launcher that disappears counts as a failure.

import { connectStore, type StoreClient } from "../rendezvous/store_client.ts";
import type { LaunchOptions } from "./arguments.ts";

const JOIN_TIMEOUT_MS = 300_000;
const LONG_MS = 24 * 3600 * 1000;
const SETTLE_TIMEOUT_MS = 30_000;
const LEAVE_TIMEOUT_MS = 5_000;
const FAREWELL_MS = 500;

/** What failed on some node. */
export interface NodeFailure {
  /** Exit code for every launcher. */
  readonly code: number;
  /** What failed, for people. */
  readonly why: string;
}

/** This launcher's link to those of the other nodes. */
export class Nodes {
  #options: LaunchOptions;
  #store!: StoreClient;
  #gone = Promise.withResolvers<NodeFailure>();
  #left = new Set<number>();
  #anyLeft = Promise.withResolvers<void>();
  #finished = false;

  private constructor(options: LaunchOptions) {
    this.#options = options;
  }

  /**
   * Joins the launchers of the other nodes.
   *
   * @param options What was asked for.
   * @param address Where node 0 serves the store, and the token.
   * @returns The link, or null when there is one node only.
   */
  static async join(
    options: LaunchOptions,
    address: { readonly hostname: string; readonly port: number; readonly token: string },
  ): Promise<Nodes | null> {
    if (options.nodes === 1) return null;
    const nodes = new Nodes(options);
    nodes.#store = await connectStore({
      ...address,
      hello: { kind: "node", number: options.nodeRank, size: options.nodes, attempt: 0 },
      timeout_ms: JOIN_TIMEOUT_MS,
      onLeft: (node, how) => nodes.#miss(node, how),
      onLost: () => nodes.#miss(0, "has ended"),
    });
    return nodes;
  }

  /** A launcher may leave as soon as it knows that all nodes are done, a little before this one knows it. */
  #miss(node: number, how: string): void {
    this.#left.add(node);
    this.#anyLeft.resolve();
    setTimeout(() => {
      if (this.#finished) return;
      this.#gone.resolve({ code: 1, why: `the launcher of node ${node} ${how}` });
    }, FAREWELL_MS);
  }

  /**
   * Waits for the first failure of an attempt on any node.
   *
   * @param attempt Number of the attempt.
   * @returns What failed.
   */
  async failure(attempt: number): Promise<NodeFailure> {
    return await Promise.race([this.#gone.promise, this.#told(attempt)]);
  }

  async #told(attempt: number): Promise<NodeFailure> {
    while (!this.#finished && !this.#left.has(0)) {
      try {
        const value = await this.#store.get(`failed/${attempt}`, LONG_MS);
        return JSON.parse(new TextDecoder().decode(value)) as NodeFailure;
      } catch {
        // the wait is over: jobs may run for longer; or node 0 has gone with the store
      }
    }
    return await this.#gone.promise;
  }

  /**
   * Tells the other nodes that a rank of this one has failed; the first to tell is heard.
   *
   * @param attempt Number of the attempt.
   * @param failure What failed.
   */
  async tell(attempt: number, failure: NodeFailure): Promise<void> {
    try {
      if (await this.#store.add(`failures/${attempt}`, 1) > 1) return;
      const text = JSON.stringify(failure);
      await this.#store.set(`failed/${attempt}`, new TextEncoder().encode(text));
    } catch {
      // the store has gone: the others know
    }
  }

  /**
   * Tells that all ranks of this node are done, and waits until those of all nodes are.
   *
   * @param attempt Number of the attempt.
   * @returns False if a node has gone before; {@linkcode Nodes.failure} says which.
   */
  async finish(attempt: number): Promise<boolean> {
    while (!this.#finished) {
      try {
        await this.#meet(`done/${attempt}`, LONG_MS);
        this.#finished = true;
      } catch {
        if (this.#left.size > 0) return false;
      }
    }
    return true;
  }

  /**
   * After a failure: waits until the ranks of all nodes have ended, so that another attempt starts on clean ground.
   *
   * @param attempt Number of the attempt.
   */
  async settle(attempt: number): Promise<void> {
    try {
      const met = this.#meet(`ended/${attempt}`, SETTLE_TIMEOUT_MS);
      await Promise.race([met, this.#anyLeft.promise]);
    } catch {
      // a node that does not answer is not waited for
    }
  }

  /** Leaves; node 0, which serves the store, leaves last. @param wait Whether the other nodes are about to leave, too. */
  async close(wait: boolean): Promise<void> {
    this.#finished = true;
    if (this.#options.nodeRank === 0 && wait) {
      const until = performance.now() + LEAVE_TIMEOUT_MS;
      while (this.#left.size < this.#options.nodes - 1 && performance.now() < until) {
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    }
    await this.#store.close();
  }

  async #meet(key: string, timeout_ms: number): Promise<void> {
    const { nodes, nodeRank } = this.#options;
    await this.#store.set(`${key}/${nodeRank}`, new Uint8Array());
    await Promise.all(
      Array.from({ length: nodes }, (_, node) => this.#store.get(`${key}/${node}`, timeout_ms)),
    );
  }
}
