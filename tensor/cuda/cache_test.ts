import assert from "node:assert/strict";
import { cacheFolder, cacheKey, cacheProblem, readCached, writeCached } from "./cache.ts";

Deno.test("compiled code is kept and read again; a broken or short file is none", async () => {
  const root = await Deno.makeTempDir();
  try {
    const folder = `${root}/a/b`, key = await cacheKey(["source", "-O3", "13.0"]);
    assert.equal(await readCached(folder, key), null);
    const code = crypto.getRandomValues(new Uint8Array(1000));
    assert.equal(await writeCached(folder, key, code), true);
    assert.deepEqual(await readCached(folder, key), code);
    assert.deepEqual([...Deno.readDirSync(folder)].map((entry) => entry.name), [key]);

    const bytes = await Deno.readFile(`${folder}/${key}`);
    for (const place of [0, 500, bytes.length - 1]) {
      const broken = bytes.slice();
      broken[place] ^= 1;
      await Deno.writeFile(`${folder}/${key}`, broken);
      assert.equal(await readCached(folder, key), null, `byte ${place}`);
    }
    for (const length of [0, 10, 32, 999, bytes.length - 1]) {
      await Deno.writeFile(`${folder}/${key}`, bytes.subarray(0, length));
      assert.equal(await readCached(folder, key), null, `${length} bytes`);
    }
    assert.equal(await writeCached(folder, key, code), true);
    assert.deepEqual(await readCached(folder, key), code);
  } finally {
    await Deno.remove(root, { recursive: true });
  }
});

Deno.test("a folder that cannot be made is no error", async () => {
  const file = await Deno.makeTempFile();
  try {
    const key = await cacheKey(["x"]);
    assert.equal(await writeCached(`${file}/below`, key, new Uint8Array(100)), false);
    assert.equal(await readCached(`${file}/below`, key), null);
  } finally {
    await Deno.remove(file);
  }
});

Deno.test({
  name: "what others could have written is not trusted: a folder, a file",
  ignore: Deno.build.os === "windows",
  async fn() {
    const root = await Deno.makeTempDir();
    try {
      const folder = `${root}/cache`, key = await cacheKey(["x"]), code = new Uint8Array(100);
      assert.equal(await cacheProblem(folder), null, "it can be made");
      assert.equal(await writeCached(folder, key, code), true);
      assert.equal((await Deno.stat(folder)).mode! & 0o777, 0o700);
      assert.equal((await Deno.stat(`${folder}/${key}`)).mode! & 0o777, 0o600);
      assert.equal(await cacheProblem(folder), null);
      for (const mode of [0o777, 0o770, 0o702]) {
        await Deno.chmod(folder, mode);
        assert.equal(await readCached(folder, key), null, `folder ${mode.toString(8)}`);
        assert.equal(await writeCached(folder, key, code), false);
        assert.match(await cacheProblem(folder) ?? "", /cache must belong to this user/);
      }
      await Deno.chmod(folder, 0o755);
      for (const mode of [0o666, 0o620]) {
        await Deno.chmod(`${folder}/${key}`, mode);
        assert.equal(await readCached(folder, key), null, `file ${mode.toString(8)}`);
      }
      assert.equal(await writeCached(folder, key, code), true, "is written anew");
      assert.deepEqual(await readCached(folder, key), code);
      assert.match(await cacheProblem(null) ?? "", /LINA_CACHE/);
      assert.match(await cacheProblem(`${folder}/${key}/below`) ?? "", /cannot be read/);
      if (Deno.uid() === 0) { // only root can give files away
        await Deno.chown(folder, 12345, null);
        assert.equal(await readCached(folder, key), null, "another user's folder");
        await Deno.chown(folder, 0, null);
        await Deno.chown(`${folder}/${key}`, 12345, null);
        assert.equal(await readCached(folder, key), null, "another user's file");
      }
    } finally {
      await Deno.remove(root, { recursive: true });
    }
  },
});

Deno.test("the key depends on every part and on where parts end", async () => {
  const keys = await Promise.all(
    [["a", "b"], ["ab"], ["a", "b", ""], ["a", "c"], ["b", "a"]].map(cacheKey),
  );
  assert.equal(new Set(keys).size, keys.length);
  assert.equal(await cacheKey(["a", "b"]), keys[0]);
  for (const key of keys) assert.match(key, /^[0-9a-f]{64}\.cubin$/);
});

Deno.test("the folder follows LINA_CACHE, XDG_CACHE_HOME, HOME", () => {
  const names = ["LINA_CACHE", "XDG_CACHE_HOME", "HOME"];
  const before = names.map((name) => Deno.env.get(name));
  try {
    for (const name of names) Deno.env.delete(name);
    assert.equal(cacheFolder(), null);
    Deno.env.set("HOME", "/home/a");
    assert.equal(cacheFolder(), "/home/a/.cache/lina");
    Deno.env.set("XDG_CACHE_HOME", "/xdg");
    assert.equal(cacheFolder(), "/xdg/lina");
    Deno.env.set("LINA_CACHE", "/own");
    assert.equal(cacheFolder(), "/own");
  } finally {
    names.forEach((name, i) => {
      const value = before[i];
      if (value === undefined) Deno.env.delete(name);
      else Deno.env.set(name, value);
    });
  }
});
