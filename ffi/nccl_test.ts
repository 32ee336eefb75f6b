import assert from "node:assert/strict";
import { LibraryNotFoundError } from "./search.ts";
import { nccl } from "./nccl.ts";

Deno.test("a missing NCCL says where it was looked for", () => {
  const before = Deno.env.get("LINA_NCCL_LIB");
  Deno.env.set("LINA_NCCL_LIB", "/nowhere/libnccl.so.2");
  try {
    assert.throws(nccl, (error: Error) => {
      assert(error instanceof LibraryNotFoundError);
      assert.match(error.message, /Cannot open NCCL .*LINA_NCCL_LIB/);
      assert.match(error.message, /\/nowhere\/libnccl\.so\.2: /);
      return true;
    });
  } finally {
    if (before === undefined) Deno.env.delete("LINA_NCCL_LIB");
    else Deno.env.set("LINA_NCCL_LIB", before);
  }
});
