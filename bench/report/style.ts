// The style sheet of the report: light, dark and printed, narrow and wide. Colours are those of Okabe and Ito, which people with any colour
// vision tell apart; nothing is told by colour alone.

/** Policies as charts know them, from the plainest on. Those that are not named here come last, in grey. */
export const POLICY_ORDER: readonly string[] = [
  "fifo",
  "outside",
  "priority",
  "lina",
  "lina+pipeline",
  "planned",
  "planned+pipeline",
];

/**
 * The class of a policy's colour and dashes.
 *
 * @param policy Its name; what follows a comma, a variant of it, changes nothing.
 * @returns `p0` to `p6`, or `px`.
 */
export function policyClass(policy: string): string {
  const place = POLICY_ORDER.indexOf(policy.split(",")[0]);
  return place < 0 ? "px" : `p${place}`;
}

/** Colours of policies on light and dark ground, and how their lines are dashed. */
const POLICIES: readonly (readonly [light: string, dark: string, dashes: string])[] = [
  ["#5b6470", "#a8b0bb", ""],
  ["#a6548a", "#d98fbd", "7 3"],
  ["#c04f00", "#f08a4b", "2 2"],
  ["#0072b2", "#4fb0ea", ""],
  ["#2a8fc7", "#8fd0f7", "9 3 2 3"],
  ["#007a5a", "#2fc79b", ""],
  ["#a87400", "#e9b440", "5 2"],
];

const LIGHT = `--ink:#14181f;--dim:#59636f;--faint:#d9dee5;--ground:#ffffff;--panel:#f5f7f9;
--compute:#7fb2dc;--a2a:#e69f00;--gradients:#1f9e77;--other:#c3cad3;--good:#00694b;--bad:#a83b00;--mark:#14181f;`;
const DARK = `--ink:#e8ecf1;--dim:#9aa5b1;--faint:#343b45;--ground:#12161b;--panel:#1a2027;
--compute:#5f97c6;--a2a:#f0b02f;--gradients:#35b98f;--other:#59626d;--good:#4fd3a6;--bad:#ff9a62;--mark:#f2f5f8;`;

function colours(which: 0 | 1): string {
  const own = POLICIES.map((policy, i) => `--p${i}:${policy[which]};`).join("");
  return (which === 0 ? LIGHT : DARK).replaceAll("\n", "") + own + "--px:var(--other);";
}

/** The style sheet. */
export const STYLE: string = `
:root{color-scheme:light dark;${colours(0)}}
@media screen and (prefers-color-scheme:dark){:root{${colours(1)}}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1140px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:.3em 0}
h2{font-size:1.25rem;margin:2.2em 0 .4em;border-top:1px solid var(--faint);padding-top:1em}
h3{font-size:1rem;margin:1.4em 0 .3em}
p{margin:.5em 0;max-width:76ch}
.dim,p.note,figcaption,caption{color:var(--dim)}
p.note,figcaption,caption{font-size:.88rem}
a{color:var(--p3)}
code{font:0.86em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
pre{background:var(--panel);padding:10px 12px;border-radius:6px;white-space:pre-wrap}
figure{margin:1em 0 1.6em}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
.scroll svg{display:block;width:100%;min-width:880px;height:auto}
figcaption{margin-top:.4em;max-width:80ch}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;padding-bottom:.4em}
th,td{padding:4px 9px 4px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--faint);vertical-align:top}
th{font-weight:600;color:var(--dim);vertical-align:bottom}
th.l,td.l{text-align:left}
th.l:not(:first-child),td.l:not(:first-child){padding-left:14px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:8px 40px;align-items:start}
details{margin:.6em 0}summary{cursor:pointer;color:var(--dim);font-size:.9rem}
tr.best td{font-weight:650}
tr.void td{color:var(--dim);text-decoration:line-through}
.why{display:inline-block;white-space:normal;min-width:11em;max-width:15em;text-decoration:none}
tr.group th{color:var(--ink);padding-top:1em;text-align:left}
.good{color:var(--good)}.bad,p.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:12px;margin:1.2em 0}
.tile{background:var(--panel);border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:1.5rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{font-size:.86rem;color:var(--dim)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;font-size:.9rem}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
svg text{fill:var(--ink);font-family:inherit;paint-order:stroke;stroke:var(--ground);stroke-width:3px;stroke-linejoin:round}
svg text.dim{fill:var(--dim)}svg text.strong{font-weight:650}
svg text.in{fill:#0b0e12;stroke:none}svg text.good{fill:var(--good)}
svg .axis{stroke:var(--dim);stroke-width:1}
svg .grid{stroke:var(--faint);stroke-width:1}
svg .lane{fill:var(--panel)}
svg .compute{fill:var(--compute)}svg .allToAll{fill:var(--a2a)}svg .gradients{fill:var(--gradients)}svg .other{fill:var(--other)}
svg .span{stroke:var(--ground);stroke-width:.6}
svg .beside{opacity:.38}
svg .waits{fill:var(--gradients);opacity:.55}
svg .done{stroke:var(--mark);stroke-width:1.6}
svg .bound{stroke:var(--mark);stroke-width:2}
svg .floor{stroke:var(--mark);stroke-width:1.6;stroke-dasharray:2 2}
svg .paper{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:6 3}
svg text.paper{fill:var(--bad);stroke:var(--ground);stroke-width:3px;stroke-dasharray:none}
svg .whisker{stroke:var(--ink);stroke-width:1}
svg .curve{fill:none;stroke-width:2.2}
${
  POLICIES.map(([, , dashes], i) =>
    `svg .fill.p${i}{fill:var(--p${i})}svg .curve.p${i}{stroke:var(--p${i})${
      dashes ? `;stroke-dasharray:${dashes}` : ""
    }}svg text.p${i}{fill:var(--p${i})}`
  ).join("\n")
}
svg .fill.px{fill:var(--px)}svg .curve.px{stroke:var(--px)}
@media screen{tbody td:first-child,thead th:first-child{position:sticky;left:0;background:var(--ground)}}
@media (max-width:600px){main{padding:14px 12px 48px}body{font-size:15px}dl{grid-template-columns:1fr}dt{margin-top:.5em}
table{font-size:.82rem}h1{font-size:1.4rem}}
@media print{body{font-size:10.5pt}main{max-width:none;padding:0}.scroll{overflow:visible}.scroll svg{min-width:0}
figure,tr,.tile{break-inside:avoid}h2,h3{break-after:avoid}table{font-size:7.4pt}th,td{padding-right:6px}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
`.trim();
