import assert from "node:assert/strict";
import { crc32, nextTurn, sha256 } from "./hash.ts";

Deno.test("checksums are those of the standards", async () => {
  const bytes = new TextEncoder().encode("123456789");
  assert.equal(crc32(bytes), 0xcbf43926);
  assert.equal(
    sha256().update("abc").digest("hex"),
    "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
  );
  await nextTurn();
});
