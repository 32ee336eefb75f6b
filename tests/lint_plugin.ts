// The two lines that hold the house: only ffi/ opens C libraries, and imports go one way,
// ffi <- tensor <- collectives <- moe <- lina <- serve, examples, with trace below all. Library code, which must work when it is
// imported by URL, imports nothing but relative files and `node:` modules. And what tensor/tensor.ts asks of scopes. Named in deno.json, so
// `deno lint` checks it.

/** The rooms from the lowest to the highest; a room imports from itself and from those before it. */
const ROOMS = ["trace", "ffi", "tensor", "collectives", "moe", "lina"] as const;
/** Files beside the rooms that belong to the library. */
const TOP_FILES = ["mod.ts", "launch.ts"];

/**
 * The folder of the repository that a file lies in.
 *
 * @param path Path from the repository's root.
 * @returns The first part, or the file itself at the top.
 */
function roomOf(path: string): string {
  return path.split("/")[0];
}

/** Whether a file is code that users import: no test, benchmark, example or server. */
function isLibrary(path: string): boolean {
  if (/(_test|_bench)\.ts$/.test(path)) return false;
  const room = roomOf(path);
  return TOP_FILES.includes(path) || (ROOMS as readonly string[]).includes(room);
}

/**
 * What is wrong with an import, if anything.
 *
 * @param path The importing file, from the repository's root.
 * @param specifier What it imports.
 * @returns The problem, or null.
 */
export function importProblem(path: string, specifier: string): string | null {
  if (!isLibrary(path)) return null;
  if (specifier.startsWith("node:")) return null;
  if (!/^\.\.?\//.test(specifier)) {
    return `Library code must import relative files and node: modules only, to work by URL: ${specifier}`;
  }
  const target = new URL(specifier, `file:///${path}`).pathname.slice(1);
  const from = (ROOMS as readonly string[]).indexOf(roomOf(path));
  if (from < 0) return null; // mod.ts and launch.ts may import every room
  const to = (ROOMS as readonly string[]).indexOf(roomOf(target));
  if (to < 0) return `${roomOf(path)}/ must not import ${target}, which is above it`;
  if (to > from) {
    return `${ROOMS[from]}/ must not import ${ROOMS[to]}/: imports go ${ROOMS.join(" <- ")}`;
  }
  return null;
}

/** Path of a file from the root of the repository, which is the folder above this one. */
function fromRoot(filename: string): string {
  const root = new URL("../", import.meta.url).pathname;
  const path = filename.startsWith("file:") ? new URL(filename).pathname : filename;
  return path.startsWith(root) ? path.slice(root.length) : path.replace(/^\.?\//, "");
}

/** The parts of a syntax tree's node that the rules look at. */
interface Specified {
  readonly source: Deno.lint.StringLiteral | Deno.lint.Expression | null;
}

/** What a node lies in, with what functions have. */
interface Enclosing {
  readonly type: string;
  readonly parent?: Enclosing;
  readonly async?: boolean;
  readonly generator?: boolean;
}

function checkImport(context: Deno.lint.RuleContext, node: Specified): void {
  const source = node.source;
  if (source?.type !== "Literal" || typeof source.value !== "string") return;
  const problem = importProblem(fromRoot(context.filename), source.value);
  if (problem !== null) context.report({ node: source, message: problem });
}

const plugin: Deno.lint.Plugin = {
  name: "lina",
  rules: {
    "dlopen-in-ffi": {
      create(context) {
        const path = fromRoot(context.filename);
        return {
          'MemberExpression[object.name="Deno"]'(node: Deno.lint.MemberExpression) {
            const named = node.property.type === "Identifier" && node.property.name === "dlopen";
            const literal = node.property.type === "Literal" && node.property.value === "dlopen";
            if ((named || literal) && roomOf(path) !== "ffi") {
              context.report({ node, message: "Only ffi/ opens C libraries; add a binding there" });
            }
          },
        };
      },
    },
    "one-way-imports": {
      create(context) {
        return {
          ImportDeclaration: (node) => checkImport(context, node),
          ExportAllDeclaration: (node) => checkImport(context, node),
          ExportNamedDeclaration: (node) => checkImport(context, node),
          ImportExpression: (node) => checkImport(context, node),
        };
      },
    },
    "scopes-without-await": {
      create(context) {
        return {
          'NewExpression[callee.name="TensorScope"]'(node: Deno.lint.NewExpression) {
            let around: Enclosing = node;
            while (around.parent && !/Function/.test(around.type)) around = around.parent;
            if (around.async || around.generator) {
              const message =
                "A TensorScope must be closed by the function that opens it before others run: no async function, no generator";
              context.report({ node, message });
            }
          },
        };
      },
    },
    "relative-urls": {
      create(context) {
        if (!isLibrary(fromRoot(context.filename))) return {};
        return {
          'MemberExpression[object.type="MetaProperty"]'(node: Deno.lint.MemberExpression) {
            const name = node.property.type === "Identifier" ? node.property.name : "";
            if (name === "dirname" || name === "filename") {
              const message =
                `import.meta.${name} is undefined when the library is imported by URL`;
              context.report({ node, message });
            }
          },
        };
      },
    },
  },
};

export default plugin;
