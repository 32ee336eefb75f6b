import assert from "node:assert/strict";
import { DeferredStore } from "./deferred_store.ts";
import { LocalStore } from "./local_store.ts";
import { encodeRequest, type Hello, MAX_FRAME_BYTES, Operation } from "./protocol.ts";
import { connectStore } from "./store_client.ts";
import { isLoopback, StoreServer } from "./store_server.ts";

const bytes = (text: string) => new TextEncoder().encode(text);
const text = (value: Uint8Array) => new TextDecoder().decode(value);
const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

function rank(number: number, size = 2, attempt = 0): Hello {
  return { kind: "rank", number, size, attempt };
}

/** A store for the length of a test. */
function serve(token = "secret") {
  const server = StoreServer.listen({ token });
  const place = { hostname: "127.0.0.1", port: server.port, token, timeout_ms: 2000 };
  return { server, place, [Symbol.dispose]: () => server.close() };
}

Deno.test("set, get and add work between ranks, in any order", async () => {
  using s = serve();
  const a = await connectStore({ ...s.place, hello: rank(0) });
  const b = await connectStore({ ...s.place, hello: rank(1) });
  const early = b.get("key");
  await a.set("key", bytes("value"));
  assert.equal(text(await early), "value");
  assert.equal(text(await b.get("key")), "value");
  await a.set("key", bytes("other"));
  assert.equal(text(await b.get("key")), "other");
  assert.deepEqual(await Promise.all([a.add("n", 2), a.add("n", 3)]), [2, 5]);
  assert.equal(await b.add("n", -1), 4);
  await a.close();
  await b.close();
  await assert.rejects(a.get("key"), /must be open: current value is closed/);
});

Deno.test("attempts have keys of their own", async () => {
  using s = serve();
  const before = await connectStore({ ...s.place, hello: rank(0, 2, 0) });
  await before.set("key", bytes("old"));
  const after = await connectStore({ ...s.place, hello: rank(0, 2, 1) });
  await assert.rejects(after.get("key", 20), /Cannot get "key"/);
  await before.close();
  await after.close();
});

Deno.test("a wait that is over names the key and the ranks that are missing", async () => {
  using s = serve();
  const a = await connectStore({ ...s.place, hello: rank(0, 6) });
  const b = await connectStore({ ...s.place, hello: rank(2, 6) });
  await assert.rejects(
    a.get("host/1", 30),
    /Cannot get "host\/1" in the rendezvous as it must be set within 30 ms: current value is unset; not connected: rank 1, 3 to 5/,
  );
  await a.close();
  await b.close();
});

Deno.test("a wrong token is refused and learns nothing", async () => {
  using s = serve();
  for (const token of ["", "secre", "secret2", "Secret"]) {
    await assert.rejects(
      connectStore({ ...s.place, token, hello: rank(0) }),
      /Cannot join the job at 127.0.0.1:\d+ as LINA_TOKEN must be the token of that job/,
    );
  }
  // All that a stranger gets is the one word that makes that message.
  const conn = await Deno.connect({ hostname: "127.0.0.1", port: s.server.port });
  await conn.write(
    encodeRequest({ operation: Operation.hello, id: 0, key: "x", value: bytes("{}") }),
  );
  const reply = new Uint8Array(await new Response(conn.readable).arrayBuffer());
  assert.equal(text(reply.subarray(9)), "token");
});

Deno.test("a second job on the port is told so", async () => {
  using s = serve("");
  const a = await connectStore({ ...s.place, hello: rank(1) });
  await assert.rejects(
    connectStore({ ...s.place, hello: rank(1) }),
    /rank 1 is connected already; perhaps another job uses this port/,
  );
  await assert.rejects(
    connectStore({ ...s.place, hello: rank(0, 3) }),
    /the job has 2 ranks, not 3; perhaps another job/,
  );
  assert.throws(
    () => StoreServer.listen({ token: "", port: s.server.port }),
    /port \d+ of 127.0.0.1 must be free: current value is in use, perhaps by another job; end that one or choose another port/,
  );
  await a.close();
});

Deno.test("departures are told to the ranks of the same attempt", async () => {
  using s = serve();
  const told: string[] = [];
  const onLeft = (number: number, how: string) => told.push(`${number} ${how}`);
  const a = await connectStore({ ...s.place, hello: rank(0, 3), onLeft });
  const b = await connectStore({ ...s.place, hello: rank(1, 3) });
  const other = await connectStore({ ...s.place, hello: rank(2, 3, 1) });
  await b.close();
  const conn = await Deno.connect({ hostname: "127.0.0.1", port: s.server.port });
  const hello = JSON.stringify(rank(2, 3));
  await conn.write(
    encodeRequest({ operation: Operation.hello, id: 0, key: "secret", value: bytes(hello) }),
  );
  await conn.read(new Uint8Array(64));
  conn.close();
  await other.close();
  while (told.length < 2) await pause(1);
  assert.deepEqual(told, ["1 has left the job", "2 has ended without leaving the job"]);
  await a.close();
});

Deno.test("strangers and malformed clients disturb nobody", async () => {
  using s = serve();
  const a = await connectStore({ ...s.place, hello: rank(0) });
  const connect = () => Deno.connect({ hostname: "127.0.0.1", port: s.server.port });
  const noise = [
    bytes("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    new Uint8Array(Uint32Array.of(MAX_FRAME_BYTES + 1).buffer),
    new Uint8Array(Uint32Array.of(5000).buffer), // as long only from somebody who is known
    new Uint8Array(Uint32Array.of(2, 0).buffer),
    encodeRequest({ operation: Operation.get, id: 0, key: "key", value: new Uint8Array(8) }),
    encodeRequest({ operation: Operation.hello, id: 0, key: "secret", value: bytes("[]") }),
    encodeRequest({ operation: Operation.hello, id: 0, key: "secret", value: bytes("{") }),
  ];
  for (const n of noise) {
    const conn = await connect();
    await conn.write(n);
    await new Response(conn.readable).arrayBuffer().catch(() => {}); // the store closes it
  }
  const silent = await Promise.all(Array.from({ length: 80 }, connect));
  await a.set("key", bytes("still here"));
  assert.equal(text(await a.get("key")), "still here");
  for (const conn of silent) conn.close();
  await a.close();
});

Deno.test("a member that sends nonsense is thrown out alone", async () => {
  using s = serve();
  const a = await connectStore({ ...s.place, hello: rank(0) });
  const conn = await Deno.connect({ hostname: "127.0.0.1", port: s.server.port });
  const value = bytes(JSON.stringify(rank(1)));
  await conn.write(encodeRequest({ operation: Operation.hello, id: 0, key: "secret", value }));
  await conn.write(encodeRequest({ operation: 99, id: 1, key: "", value: new Uint8Array() }));
  await new Response(conn.readable).arrayBuffer();
  assert.equal(await a.add("n", 1), 1);
  await a.close();
});

Deno.test("a member that does not read is thrown out before it fills the memory", async () => {
  using s = serve();
  const a = await connectStore({ ...s.place, hello: rank(0) });
  await a.set("large", new Uint8Array(1_000_000));
  const conn = await Deno.connect({ hostname: "127.0.0.1", port: s.server.port });
  const value = bytes(JSON.stringify(rank(1)));
  await conn.write(encodeRequest({ operation: Operation.hello, id: 0, key: "secret", value }));
  const get = encodeRequest({
    operation: Operation.get,
    id: 1,
    key: "large",
    value: new Uint8Array(8),
  });
  let refused = false;
  for (let i = 0; i < 200 && !refused; i++) {
    await conn.write(get).catch(() => refused = true);
    await pause(1);
  }
  assert.ok(refused);
  conn.close();
  await a.close();
});

Deno.test("a store that ends is an error of what waits, and is told", async () => {
  const s = serve();
  const lost = Promise.withResolvers<void>();
  const a = await connectStore({ ...s.place, hello: rank(0), onLost: lost.resolve });
  const waiting = assert.rejects(
    a.get("key"),
    /the process that serves it must run: current value is ended/,
  );
  await pause(20);
  s.server.close();
  await waiting;
  await lost.promise;
  await a.close();
});

Deno.test("connecting waits for the store, and says where it waited", async () => {
  using s = serve();
  const { port } = s.server;
  s.server.close();
  const place = { hostname: "127.0.0.1", port, token: "t" };
  await assert.rejects(
    connectStore({ ...place, hello: rank(0), timeout_ms: 50 }),
    new RegExp(`must listen at 127.0.0.1:${port} within 50 ms: current value is unreachable`),
  );
  const later = connectStore({ ...place, hello: rank(0), timeout_ms: 5000 });
  await pause(50);
  const server = StoreServer.listen({ port, token: "t" });
  await (await later).close();
  server.close();
});

Deno.test("connecting is bounded where packets get no answer", async () => {
  using busy = Deno.listen({ hostname: "127.0.0.1", port: 0, tcpBacklog: 1 });
  const { hostname, port } = busy.addr;
  const open: Deno.TcpConn[] = [];
  try {
    for (let i = 0; i < 8; i++) { // fill its queue: what comes after that is dropped
      open.push(await Deno.connect({ hostname, port, signal: AbortSignal.timeout(100) }));
    }
  } catch { /* full */ }
  const start = performance.now();
  await assert.rejects(
    connectStore({ hostname, port, token: "t", hello: rank(0), timeout_ms: 200 }),
    /within 200 ms: current value is unreachable/,
  );
  assert.ok(performance.now() - start < 5000);
  for (const conn of open) conn.close();
});

Deno.test("a wait without limit is one", async () => {
  using s = serve();
  const local = new LocalStore();
  const remote = await connectStore({ ...s.place, hello: rank(0) });
  for (const store of [local, remote]) {
    const waiting = store.get("key", Infinity);
    await pause(20);
    await store.set("key", bytes("value"));
    assert.equal(text(await waiting), "value");
    await store.close();
  }
});

Deno.test("a key is waited for as long as the connection says", async () => {
  using s = serve();
  const a = await connectStore({ ...s.place, hello: rank(0), timeout_ms: 40 });
  await assert.rejects(a.get("key"), /must be set within 40 ms/);
  await a.close();
});

Deno.test("something else on the port is recognised", async () => {
  const server = Deno.serve(
    { port: 0, hostname: "127.0.0.1", onListen() {} },
    () => new Response(),
  );
  const place = { hostname: "127.0.0.1", port: server.addr.port, token: "" };
  await assert.rejects(
    connectStore({ ...place, hello: rank(0), timeout_ms: 3000 }),
    /a program that does not answer as one/,
  );
  await server.shutdown();
});

Deno.test("without a token only loopback is bound", () => {
  assert.throws(
    () => StoreServer.listen({ hostname: "0.0.0.0", token: "" }),
    /LINA_TOKEN must be set, to the same secret on every node/,
  );
  assert.ok(isLoopback("127.0.0.1") && isLoopback("localhost") && isLoopback("::1"));
  assert.ok(!isLoopback("10.0.0.1") && !isLoopback("127.0.0.1.example.org"));
});

Deno.test("a world of one has a store, too", async () => {
  const store = new LocalStore();
  const early = store.get("key");
  await store.set("key", bytes("value"));
  assert.equal(text(await early), "value");
  assert.equal(text(await store.get("key")), "value");
  await assert.rejects(store.get("other", 10), /Cannot get "other"/);
  assert.deepEqual([await store.add("n", 2), await store.add("n", 2)], [2, 4]);
});

Deno.test("a deferred store passes on what was asked before it came", async () => {
  const store = new DeferredStore();
  const early = store.get("key");
  const set = store.set("key", bytes("value"));
  store.give(new LocalStore());
  await set;
  assert.equal(text(await early), "value");
  assert.equal(await store.add("n", 1), 1);
  await store.close();
  await new DeferredStore().close(); // nothing to close, nothing to wait for
});
