import assert from "node:assert/strict";
import { cudaCandidates, CudaError, openCudaLibrary } from "./cuda_library.ts";
import { LibraryNotFoundError } from "./search.ts";

/** Environment variables that name places. */
const PLACES = [
  "CUDA_HOME",
  "CUDA_PATH",
  "LD_LIBRARY_PATH",
  "VIRTUAL_ENV",
  "CONDA_PREFIX",
  "HOME",
  "PATH",
];

/** Runs a function while the environment has these places and no others. */
function withPlaces<T>(places: Record<string, string>, run: () => T): T {
  const before = PLACES.map((name) => Deno.env.get(name));
  for (const name of PLACES) Deno.env.delete(name);
  for (const [name, value] of Object.entries(places)) Deno.env.set(name, value);
  try {
    return run();
  } finally {
    PLACES.forEach((name, i) => {
      const value = before[i];
      if (value === undefined) Deno.env.delete(name);
      else Deno.env.set(name, value);
    });
  }
}

/** Makes empty files with their folders. */
function touch(...paths: string[]): void {
  for (const path of paths) {
    Deno.mkdirSync(path.replace(/\/[^/]*$/, ""), { recursive: true });
    Deno.writeTextFileSync(path, "");
  }
}

Deno.test("CUDA libraries are found in toolkits, wheels and the loader's path, bare names last", () => {
  const root = Deno.makeTempDirSync();
  try {
    const at = {
      toolkit: `${root}/toolkit/lib64/libfoo.so.13`,
      loader: `${root}/loader/libfoo.so.13`,
      venv: `${root}/venv/lib/python3.12/site-packages/nvidia/foo/lib/libfoo.so.12`,
      newer: `${root}/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libfoo.so.13`,
      conda: `${root}/conda/lib/libfoo.so.12`,
      user: `${root}/home/.local/lib/python3.11/site-packages/nvidia/foo/lib/libfoo.so.12`,
    };
    touch(...Object.values(at));
    const found = withPlaces({
      CUDA_HOME: `${root}/toolkit`,
      LD_LIBRARY_PATH: `relative:${root}/loader:/no/such/folder`,
      VIRTUAL_ENV: `${root}/venv`,
      CONDA_PREFIX: `${root}/conda`,
      HOME: `${root}/home`,
    }, () => cudaCandidates(["libfoo.so.13", "libfoo.so.12"]));
    assert.deepEqual(found, [
      at.toolkit,
      at.loader,
      at.newer,
      at.venv,
      at.conda,
      at.user,
      "libfoo.so.13",
      "libfoo.so.12",
    ]);
  } finally {
    Deno.removeSync(root, { recursive: true });
  }
});

Deno.test("CUDA libraries are found in the wheels of the python3 on the PATH, through its links", () => {
  const root = Deno.makeTempDirSync();
  try {
    const wheel = `${root}/python/lib/python3.13/site-packages/nvidia/foo/lib/libfoo.so.13`;
    touch(wheel, `${root}/python/bin/python3.13`);
    Deno.mkdirSync(`${root}/bin`);
    Deno.symlinkSync(`${root}/python/bin/python3.13`, `${root}/bin/python3`);
    const found = withPlaces(
      { PATH: `/no/such/folder:${root}/bin` },
      () => cudaCandidates(["libfoo.so.13"]),
    );
    assert.deepEqual(found, [Deno.realPathSync(wheel), "libfoo.so.13"]);
  } finally {
    Deno.removeSync(root, { recursive: true });
  }
});

Deno.test("a CUDA library that is nowhere: the error lists files tried and folders looked into", () => {
  withPlaces({ CUDA_HOME: "/no/toolkit" }, () => {
    assert.throws(
      () => openCudaLibrary("Foo", "libnosuchfoo.so", "LINA_NO_SUCH_FOO", {}),
      (error) =>
        error instanceof LibraryNotFoundError &&
        ["Foo", "LINA_NO_SUCH_FOO", "libnosuchfoo.so.13", "libnosuchfoo.so.12", "/no/toolkit/lib64"]
          .every((part) => error.message.includes(part)),
    );
  });
});

Deno.test("CudaError names call, code and message", () => {
  const error = new CudaError("cudaMalloc", 2, "cudaErrorMemoryAllocation", "out of memory");
  assert.equal(
    error.message,
    "cudaMalloc failed with cudaErrorMemoryAllocation (2): out of memory",
  );
  assert.deepEqual([error.call, error.code, error.codeName], [
    "cudaMalloc",
    2,
    "cudaErrorMemoryAllocation",
  ]);
});
