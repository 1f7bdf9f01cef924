// The page: what is shown of the chosen output, and the theme.

const THEMES = { auto: "as the system", light: "light", dark: "dark" };
const chosen = { at: 0, axis: "file_bytes" };

function cards(output) {
  const reference = DATA.reference;
  const made = [];
  const card = (title, value, more, id) =>
    made.push(el("div", { id }, el("dt", null, title), el("dd", null, value), more ? el("dd", null, more) : null));
  const both = (title, key, text, id) =>
    card(title, text(output[key]), reference ? `${text(reference[key])} before${!reference[key] || reference[key] === output[key] ? "" : `, ${change(reference[key], output[key])}`}` : "", id);
  both("File", "file_bytes", size, "card-file");
  both("Weights", "weight_bytes", size, "card-weights");
  both("Parameters", "parameters", amount, "card-parameters");
  both("Nodes", "nodes", amount, "card-nodes");
  both("Multiply-adds", "macs", amount, "card-macs");
  const [verdict, ...more] = visible(output.verdict).replace(/ (%|dB)/g, "\u00a0$1").split(", ");
  if (verdict) card("Outputs beside the original's", verdict, more.join(", "), "card-outputs");
  if (output.accuracy) card(output.accuracy[0], figure(output.accuracy[3]), `${figure(output.accuracy[2])} before`, "card-accuracy");
  if (output.speed) card("Speed", `${output.speed.speedup.toFixed(2)}×`, `quartiles ${output.speed.low.toFixed(2)} to ${output.speed.high.toFixed(2)}`, "card-speed");
  return made;
}

function outputsSection() {
  const quality = DATA.quality;
  const made = [];
  if (DATA.outputs.length < 2)
    made.push(el("p", null, "This report is of one output. Name several to see their sizes and qualities beside each other: ",
      el("code", null, "effic report a.onnx b.onnx --reference in.onnx")));
  else {
    const picture = scatter(chosen.axis, choose);
    if (!quality) made.push(note("No quality is known for all of these outputs, so there is no chart of it."));
    else if (!picture) made.push(note("Fewer than two outputs have a finite figure here, so there is no chart; the table has all there is."));
    else {
      const timed = DATA.outputs.every((row) => row.speed);
      made.push(el("p", null, `${quality.title}, ${quality.how}.`),
        timed ? el("div", { class: "filters" }, el("label", null, "Across", el("select", { id: "axis", onchange: (event) => { chosen.axis = event.target.value; fill("outputs", outputsSection()); document.getElementById("axis").focus(); } },
          [["file_bytes", "file size"], ["ms", "time of a run"]].map(([value, text]) => el("option", { value, selected: value === chosen.axis }, text))))) : null,
        picture);
    }
  }
  // Of one output alone its record knows how far it is from the original, on the inputs it was checked on.
  const own = DATA.outputs.length === 1 && !quality;
  const value = (row) => own ? (row.distance_equal ? "equal" : row.sqnr_db === null ? "–" : `${row.sqnr_db.toFixed(1)} dB`) :
    (row.quality === null ? (row.equal ? "equal" : "–") : `${figure(row.quality)}${quality && quality.unit ? ` ${quality.unit}` : ""}`);
  const original = DATA.reference ? [{ cells: [
    el("span", null, named(DATA.reference.name), " (original)"), size(DATA.reference.file_bytes), "", size(DATA.reference.weight_bytes),
    amount(DATA.reference.nodes), quality && quality.reference !== null ? figure(quality.reference) : "–", "–"] }] : [];
  made.push(table("The outputs", [["model", "wide"], ["file", "figure"], ["change", "figure"], ["weights", "figure"], ["nodes", "figure"],
    [quality ? quality.title : own ? "SQNR of the outputs" : "quality", "figure"], ["speed", "figure"]],
  [...original, ...DATA.outputs.map((row, at) => ({
    attributes: { class: at === chosen.at && DATA.outputs.length > 1 ? "chosen" : null },
    cells: [
      DATA.outputs.length > 1
        ? el("button", { type: "button", class: "link", title: "Show this one below", "aria-pressed": String(at === chosen.at), onclick: () => choose(at) }, named(row.name))
        : named(row.name),
      { content: size(row.file_bytes), value: row.file_bytes }, DATA.reference ? change(DATA.reference.file_bytes, row.file_bytes) : "–",
      { content: size(row.weight_bytes), value: row.weight_bytes }, { content: amount(row.nodes), value: row.nodes },
      { content: value(row), value: own ? row.sqnr_db : row.quality }, row.speed ? { content: `${row.speed.speedup.toFixed(2)}×`, value: row.speed.speedup } : "–",
    ] }))], { id: "outputs-table" }));
  return made.filter(Boolean);
}

function passesTable(output) {
  if (!output.passes.length) return [note("Nothing tells which passes made this file.")];
  const reasons = (row) => {
    const missed = new Map();
    for (const remark of row.remarks.filter((each) => each.kind === "missed")) {
      // The same reason names another node at every place.
      const key = remark.text.replace(/'[^']*'/g, "");
      if (!missed.has(key)) missed.set(key, [remark, 0]);
      missed.get(key)[1]++;
    }
    if (!missed.size) return String(row.missed);
    return el("details", null, el("summary", null, String(row.missed)), el("ul", null, [...missed.values()].map(([remark, count]) =>
      el("li", null, named(remark.where), count > 1 ? ` and ${count - 1} more` : "", `: ${visible(remark.text)}`))));
  };
  return [table("All passes, in order", [["pass", "wide"], ["changed", "figure"], ["left alone", ""], ["weights", "figure"], ["nodes", "figure"],
    ["outputs", "middle"], ["score", "figure"], ["time", "figure"]],
  output.passes.map((row) => ({
    attributes: { class: row.rolled_back ? "undone" : null },
    cells: [
      el("span", null, el("code", null, visible(row.lowering ? `lower for ${row.text}` : row.text)), row.rolled_back ? el("div", null, `rolled back: ${visible(row.rolled_back)}`) : null),
      { content: String(row.rolled_back ? 0 : row.passed), value: row.passed }, reasons(row),
      { content: move(row.bytes_before, row.bytes_after, size), value: row.bytes_after },
      { content: row.nodes_after === null ? "–" : move(row.nodes_before, row.nodes_after, String), value: row.nodes_after },
      { content: visible(row.verdict || "not recorded"), value: row.sqnr_db }, { content: row.score === null ? "–" : figure(row.score), value: row.score },
      { content: duration(row.seconds), value: row.seconds },
    ] })), { id: "passes-table" })];
}

function made(output) {
  const found = output.made;
  const facts = [
    ["file", [named(output.name), output.sha256 ? el("span", null, ", sha256 ", el("code", null, output.sha256)) : ""]],
    ["made from", found.source.length ? found.source.map((digest, at) => [at ? ", " : "sha256 ", el("code", null, digest)]).flat() : null],
    ["passes", found.passes.length ? found.passes.flatMap((text, at) => [at ? ", " : "", el("code", null, visible(text))]) : null],
    ["target", found.target ? [el("code", null, visible(found.target))] : null],
    ["calibrated on", found.random ? ["RANDOM NUMBERS, as asked for: give real data before the result is used"] : found.calibration ? ["data with the sha256 ", el("code", null, visible(found.calibration))] : null],
    ["seed", found.seed === null ? null : [String(found.seed)]],
    ["versions", Object.keys(found.versions).length ? [visible(Object.entries(found.versions).map((pair) => pair.join(" ")).join(", "))] : null],
    ["machine", found.machine ? [visible(found.machine)] : null],
    ["time of the build", output.seconds === null ? null : [duration(output.seconds)]],
    ["operators", [Object.entries(output.ops).sort((a, b) => b[1] - a[1]).map(([op, count]) => `${visible(op)} ${count}`).join(", ")]],
  ].filter(([, value]) => value !== null);
  return [found.target ? null : note("No build is recorded in or beside this file, so this is all that is known of it."),
    el("dl", { class: "facts" }, facts.map(([name, value]) => [el("dt", null, name), el("dd", null, ...value)]).flat())];
}

function choose(at) {
  chosen.at = at;
  document.getElementById("output").value = String(at);
  show();
}

function show() {
  const output = DATA.outputs[chosen.at];
  const state = {};
  fill("notes", [...DATA.notes, ...output.notes].map(note));
  fill("cards", cards(output));
  fill("outputs", outputsSection());
  fill("passes", waterfalls(output), passesTable(output));
  fill("treemap", treemaps(output));
  fill("sites", sitesTable(output.sites, (site) => neighbourhoods.choose(site.node_after, site.node_before)));
  fill("graph", neighbourhoods(output, state));
  fill("made", made(output));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = `Theme: ${THEMES[theme]}`;
}

document.getElementById("title").textContent = `effic report`;
document.getElementById("subtitle").append(DATA.reference ? el("span", null, named(DATA.reference.name), " → ") : "", named(DATA.title));
if (DATA.outputs.length > 1) {
  const select = document.getElementById("output");
  select.append(...DATA.outputs.map((row, at) => el("option", { value: at }, visible(row.name))));
  select.addEventListener("change", () => choose(Number(select.value)));
  document.getElementById("chooser").hidden = false;
}
document.getElementById("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
});

// A sheet between its margins is about this wide, whatever the window was (A4 at 96 dots an inch, less 28 mm).
const SHEET = 680;
const charts = () => document.querySelectorAll(".js-plotly-plot");
window.addEventListener("beforeprint", () => {
  if (sitesTable.beforePrint) sitesTable.beforePrint();
  charts().forEach((box) => Plotly.relayout(box, { width: SHEET }));
});
window.addEventListener("afterprint", () => {
  if (sitesTable.afterPrint) sitesTable.afterPrint();
  charts().forEach((box) => Plotly.relayout(box, { width: null, autosize: true }));
});
show();
document.documentElement.dataset.ready = "yes";
