import assert from "node:assert/strict";
import { LibraryNotFoundError, openFirst } from "./search.ts";

const GETPID = { getpid: { parameters: [], result: "i32" } } as const;
const LIBC = Deno.build.os === "darwin" ? "/usr/lib/libSystem.B.dylib" : "libc.so.6";

Deno.test("openFirst() takes the first candidate that loads", () => {
  const found = openFirst("C", ["/no/such.so", LIBC], GETPID, { env: "LINA_TEST_LIB" });
  assert.equal(found.path, LIBC);
  assert.equal(found.symbols.getpid(), Deno.pid);
});

Deno.test("openFirst() lists every path tried", () => {
  assert.throws(
    () => openFirst("Lib", ["/no/a.so", "libnothing.so.9"], GETPID, { env: "LINA_TEST_LIB" }),
    (error) =>
      error instanceof LibraryNotFoundError && error.message.includes("/no/a.so: ") &&
      error.message.includes("libnothing.so.9: ") && error.message.includes("LINA_TEST_LIB"),
  );
});

Deno.test("openFirst() skips a library that lacks the symbols", () => {
  assert.throws(
    () =>
      openFirst("C", [LIBC], { no_such_call: { parameters: [], result: "i32" } }, {
        env: "LINA_TEST_LIB",
      }),
    /no_such_call/,
  );
});

Deno.test("openFirst() tries only the override when it is set", () => {
  Deno.env.set("LINA_TEST_LIB", "/no/override.so");
  try {
    assert.throws(
      () => openFirst("C", [LIBC], GETPID, { env: "LINA_TEST_LIB" }),
      (error) =>
        error instanceof LibraryNotFoundError && error.message.includes("/no/override.so") &&
        !error.message.includes(LIBC),
    );
    Deno.env.set("LINA_TEST_LIB", "libc.so.6");
    assert.throws(
      () => openFirst("C", [LIBC], GETPID, { env: "LINA_TEST_LIB" }),
      /must be an absolute path: current value is "libc.so.6"/,
    );
  } finally {
    Deno.env.delete("LINA_TEST_LIB");
  }
});
