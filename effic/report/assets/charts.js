// Charts: waterfalls, treemaps, the scatter of size and quality. Colours that must fit both themes live in page.css.

const COLOURS = { less: "#1a9a83", more: "#d9682b", total: "#5b7fb0", point: "#2f75c9", original: "#8a6fb8" };
// Widths of a weight from fine to coarse; readable beside each other also without colour vision.
const WIDTHS = [
  [2, "up to 2 bits", "#f3d34a"],
  [4, "3 to 4 bits", "#9fcb5c"],
  [8, "5 to 8 bits", "#4fb0a5"],
  [16, "9 to 16 bits", "#6c9bd2"],
  [Infinity, "more than 16 bits", "#a9b1bd"],
];
const UNKNOWN = ["not known", "#d8c7d8"];
const CONFIG = { responsive: true, displayModeBar: false, displaylogo: false, plotlyServerURL: "" };
const HOVER = { bgcolor: "#1c2430", bordercolor: "#1c2430", font: { color: "#ffffff", size: 13 } };
const FONT = { family: 'system-ui, "Segoe UI", "DejaVu Sans", Arial, sans-serif', size: 12, color: "#56606e" };

function draw(label, height, traces, layout) {
  const box = el("div", { class: "chart", role: "img", "aria-label": label, style: `height:${height}px` });
  // Plotly measures its box, which must be in the page by then.
  queueMicrotask(() =>
    Plotly.newPlot(box, traces, {
      height, font: FONT, hoverlabel: HOVER, showlegend: false, autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", ...layout,
    }, CONFIG));
  return box;
}

/** A pass's text in little room: its options go first, for the name tells more. */
function passText(text, width) {
  if (Array.from(text).length <= width || !text.includes("{")) return shorten(text, width);
  return `${shorten(text.slice(0, text.indexOf("{")), width - 3)}{…}`;
}

/** Bars that start where the last one ended. Steps: {text, value, measure, label, hover}. */
function waterfall(title, steps, axis) {
  const width = window.innerWidth < 640 ? 16 : 30;
  const reach = steps.reduce(
    (found, step) => {
      const now = step.measure === "relative" ? found.at + step.value : step.value;
      return { at: now, most: Math.max(found.most, now), least: Math.min(found.least, now, 0) };
    }, { at: 0, most: 0, least: 0 });
  return draw(
    `${title}: ${steps.map((step) => `${visible(step.text)} ${step.label}`).join("; ")}`,
    66 + 30 * steps.length,
    [{
      type: "waterfall", orientation: "h", y: steps.map((_, at) => at), x: steps.map((step) => step.value),
      measure: steps.map((step) => step.measure), text: steps.map((step) => tame(step.label)),
      textposition: "outside", cliponaxis: false, customdata: steps.map((step) => tame(step.hover || step.text)),
      hovertemplate: "%{customdata}<extra></extra>",
      decreasing: { marker: { color: COLOURS.less } }, increasing: { marker: { color: COLOURS.more } },
      totals: { marker: { color: COLOURS.total } }, connector: { line: { width: 1, color: "#7d8da1" } },
    }],
    {
      margin: { l: 10, r: 10, t: 8, b: 40 },
      yaxis: {
        autorange: "reversed", automargin: true, fixedrange: true, tickvals: steps.map((_, at) => at),
        ticktext: steps.map((step) => tame(passText(step.text, width))), showgrid: false, zeroline: false,
      },
      xaxis: {
        title: { text: axis }, fixedrange: true, automargin: true, nticks: 6,
        // Room for the figure beside the longest bar.
        range: [reach.least * 1.3, (reach.most || 1) * 1.32], zeroline: true, ...(axis === "bytes" ? { tickformat: "~s" } : {}),
      },
    });
}

/** The three waterfalls of an output, each a chart or a sentence why there is none. */
function waterfalls(output) {
  const told = output.passes.filter((row) => row.changed || row.rolled_back);
  const name = (row) => (row.lowering ? `lower for ${row.text}` : row.text);
  const kept = told.filter((row) => !row.rolled_back);
  const made = [];

  const sized = kept.filter((row) => row.bytes_after !== row.bytes_before);
  made.push(el("h3", null, "Weights, in bytes"));
  if (!output.passes.length) made.push(note("No pass is recorded, so the bytes cannot be told apart."));
  else if (!sized.length) made.push(el("p", null, "No pass changed the bytes of the weights."));
  else made.push(waterfall("Bytes of the weights, pass by pass", [
    { text: "before", value: output.passes[0].bytes_before, measure: "absolute", label: size(output.passes[0].bytes_before) },
    ...sized.map((row) => {
      const moved = row.bytes_after - row.bytes_before;
      const label = `${moved > 0 ? "+" : "−"}${size(Math.abs(moved))}`;
      return { text: name(row), value: moved, measure: "relative", label, hover: `${name(row)}: ${label}` };
    }),
    { text: "after", value: output.passes.at(-1).bytes_after, measure: "absolute", label: size(output.passes.at(-1).bytes_after) },
  ], "bytes"));

  made.push(el("h3", null, "Error of the outputs"));
  const run = kept.filter((row) => row.equal !== null);
  const moved = run.filter((row) => !row.equal && row.sqnr_db !== null);
  const share = (db) => 100 * 10 ** (-db / 10);
  if (!run.length)
    made.push(note(output.known === "record"
      ? "The numbers were not checked after each pass (--check final or off), so no error is known."
      : "No error is recorded: there is no record of the build that tells of it."));
  else if (!moved.length) made.push(el("p", null, "No pass moved the outputs at all on the inputs that were tried."));
  else {
    made.push(waterfall("Noise that each pass added to the outputs", [
      ...moved.map((row) => ({
        text: name(row), value: share(row.sqnr_db), measure: "relative", label: `${row.sqnr_db.toFixed(1)} dB`,
        hover: `${name(row)}: SQNR ${row.sqnr_db.toFixed(1)} dB, noise ${figure(share(row.sqnr_db))} % of the signal`,
      })),
      ...(output.sqnr_db === null ? [] : [{
        text: "result, measured", value: share(output.sqnr_db), measure: "absolute", label: `${output.sqnr_db.toFixed(1)} dB`,
      }]),
    ], "noise power, % of the signal's"));
    made.push(el("p", { class: "quiet" },
      "Each bar is the outputs' distance from those before the pass. The last is the finished file beside the " +
      "original, as the runtime runs it; errors of passes may add up to more or to less."));
  }

  made.push(el("h3", null, "Latency"));
  const timed = kept.filter((row) => row.speedup);
  if (!output.speed && !timed.length)
    made.push(note("No latency was measured. Build with --keep-if-faster, or write the report with --time."));
  else if (!timed.length) made.push(el("p", null, `${speedText(output.speed)} The passes were not timed one by one.`));
  else {
    const unit = output.speed ? output.speed.reference_ms : 100;
    const show = (value) => (output.speed ? duration(value / 1e3) : `${value.toFixed(1)} %`);
    let now = unit;
    const steps = [{ text: "before", value: now, measure: "absolute", label: show(now) }];
    for (const row of timed) {
      const next = now / row.speedup[0];
      const [middle, low, high] = row.speedup.map((value) => value.toFixed(2));
      steps.push({
        text: name(row), value: next - now, measure: "relative", label: `${middle} times as fast`,
        hover: `${name(row)}: ${middle} times as fast (quartiles ${low} to ${high})`,
      });
      now = next;
    }
    // By the ratio of neighbouring turns, which noise of the machine hits alike, not by the medians of each.
    if (output.speed) steps.push({
      text: "result, measured", value: unit / output.speed.speedup, measure: "absolute",
      label: `${output.speed.speedup.toFixed(2)} times as fast`, hover: speedText(output.speed),
    });
    made.push(waterfall("Time of one run, pass by pass", steps, output.speed ? "milliseconds a run" : "% of the original's time"));
    if (output.speed) made.push(el("p", { class: "quiet" }, speedText(output.speed)));
  }
  return made;
}

function speedText(speed) {
  return `${speed.speedup.toFixed(2)} times as fast as the original (quartiles ${speed.low.toFixed(2)} to ` +
    `${speed.high.toFixed(2)}), ${duration(speed.ms / 1e3)} a run beside ${duration(speed.reference_ms / 1e3)}` +
    `${speed.threads ? `, threads ${speed.threads}` : ""}; measured ${speed.when}.`;
}

const MOST_LEAVES = 400;

/** Rows of weights as a tree by the parts of their names; the smallest share a leaf where there are many. */
function tree(sites, bytes, bits, rest, title) {
  const nodes = new Map([["", { id: "", label: title, parent: null, value: 0, bits: null, hover: title }]]);
  const shown = sites.filter((site) => site[bytes]).sort((a, b) => b[bytes] - a[bytes]);
  const put = (id, label, parent, value, width, hover) => {
    const found = nodes.get(id);
    if (found) found.value += value;
    else nodes.set(id, { id, label, parent, value, bits: width, hover });
  };
  const grow = (parts, leaf, value, width, hover) => {
    nodes.get("").value += value;
    let at = "";
    for (const part of parts) {
      const next = `${at}/${part}`;
      put(next, part, at, value, null, null);
      at = next;
    }
    // The bar keeps a weight apart from a module of the same name.
    put(`${at}|${leaf}`, leaf.split("|")[0], at, value, width, hover);
  };
  shown.forEach((site, at) => {
    const parts = site.name.split(/[/.]+/).filter(Boolean);
    if (at < MOST_LEAVES) {
      const leaf = parts.pop() || site.name;
      grow(parts, `${leaf}|${at}`, site[bytes], bits(site), `${site.name}: ${size(site[bytes])}, ${bits.text(site)}`);
    } else grow(parts.slice(0, 1), "smaller weights", site[bytes], null, null);
  });
  if (rest > 0) grow([], "other constants", rest, null, `biases, scales of activations and other constants: ${size(rest)}`);
  return folded([...nodes.values()]);
}

/** The same without modules of one member, whose member takes their place: `block/0` over `conv` over `weight`. */
function folded(nodes) {
  const members = new Map();
  for (const node of nodes) if (node.parent !== null) members.set(node.parent, [...(members.get(node.parent) || []), node]);
  const gone = new Set();
  for (const node of nodes) {
    const [only, ...others] = members.get(node.id) || [];
    if (node.parent === null || !only || others.length) continue;
    only.parent = node.parent;
    only.label = `${node.label}.${only.label}`;
    gone.add(node);
  }
  const kept = nodes.filter((node) => !gone.has(node));
  const parents = new Set(kept.map((node) => node.parent));
  for (const node of kept) node.leaf = !parents.has(node.id);
  return kept;
}

function widthColour(bits) {
  return bits === null ? UNKNOWN[1] : WIDTHS.find(([most]) => bits <= most)[2];
}

function treemap(label, nodes) {
  return draw(label, Math.max(300, Math.min(480, window.innerWidth * 0.7)), [{
    type: "treemap", branchvalues: "total", ids: nodes.map((node) => node.id || "all"),
    labels: nodes.map((node) => tame(shorten(node.label, 40))),
    parents: nodes.map((node) => (node.parent === null ? "" : node.parent || "all")),
    values: nodes.map((node) => node.value), text: nodes.map((node) => size(node.value)), textinfo: "label+text",
    customdata: nodes.map((node) => tame(node.hover || `${node.label}: ${size(node.value)}`)),
    hovertemplate: "%{customdata}<extra></extra>", maxdepth: 4, tiling: { pad: 2 }, pathbar: { visible: true, thickness: 22 },
    marker: {
      colors: nodes.map((node) => (node.leaf ? widthColour(node.bits) : "#eef1f5")),
      line: { width: 1, color: "#7d8da1" }, pad: { t: 20, l: 3, r: 3, b: 3 },
    },
    textfont: { color: "#1c2430" }, insidetextfont: { color: "#1c2430" }, outsidetextfont: { color: "#1c2430" },
  }], { margin: { l: 0, r: 0, t: 26, b: 0 } });
}

function treemaps(output) {
  const reference = DATA.reference;
  const beforeBits = (site) => (site.rows * site.columns ? (8 * site.bytes_before) / (site.rows * site.columns) : null);
  beforeBits.text = (site) => site.stored_before || "";
  const afterBits = (site) => site.bits;
  afterBits.text = (site) => site.stored || (site.bits === null ? "" : `${site.bits} bits`);
  const total = (sites, key) => sites.reduce((sum, site) => sum + (site[key] || 0), 0);
  const one = (heading, model, key, bits) => {
    const rest = Math.max(0, model.weight_bytes - total(output.sites, key));
    if (!model.weight_bytes) return el("div", null, el("h3", null, heading), el("p", { class: "note" }, "It holds no weights."));
    return el("div", null, el("h3", null, heading),
      treemap(`${heading}, by module; the same figures are in the table of weights`,
        tree(output.sites, key, bits, rest, `all, ${size(model.weight_bytes)}`)));
  };
  const known = [...WIDTHS.map(([, text, colour]) => [text, colour]), ["several, or other constants", UNKNOWN[1]]];
  return [
    el("p", null, "Area is bytes, colour is the width of a weight. Choose a module to look into it."),
    el("ul", { class: "legend", "aria-label": "Colours" }, known.map(([text, colour]) =>
      el("li", null, el("span", { class: "swatch", style: `background:${colour}` }), text))),
    el("div", { class: "pair" },
      reference
        ? one(`Before: ${size(reference.weight_bytes)}`, reference, "bytes_before", beforeBits)
        : el("div", null, el("h3", null, "Before"), note("The original was not at hand, so there is no map of it; name it with --reference.")),
      one(`After: ${size(output.weight_bytes)}`, output, "bytes_after", afterBits)),
  ];
}

/** Outputs by size or time and quality; null where fewer than two points are known. */
function scatter(axis, choose) {
  const quality = DATA.quality;
  const place = (row) => (axis === "file_bytes" ? row.file_bytes : row.speed && row.speed.ms);
  const points = DATA.outputs.filter((row) => row.quality !== null && place(row)).map((row) => ({
    name: row.name, x: place(row), y: row.quality, colour: COLOURS.point, symbol: "circle",
  }));
  if (points.length < 2) return null;
  const timed = DATA.outputs.find((row) => row.speed);
  const x = axis === "file_bytes" ? DATA.reference && DATA.reference.file_bytes : timed && timed.speed.reference_ms;
  if (DATA.reference && quality.reference !== null && x)
    points.push({ name: `${DATA.reference.name} (original)`, x, y: quality.reference, colour: COLOURS.original, symbol: "diamond" });
  const show = axis === "file_bytes" ? size : (value) => duration(value / 1e3);
  points.sort((a, b) => a.x - b.x);
  const [least, most] = [Math.min(...points.map((p) => p.y)), Math.max(...points.map((p) => p.y))];
  const room = (most - least) / 4 || Math.abs(most) / 50 || 1;
  // A share ends at 1, whatever room the chart has above it.
  const top = least >= 0 && most <= 1 && most > 0.5 ? Math.min(most + room, 1.04) : most + room;
  const middle = (Math.min(...points.map((p) => p.x)) + Math.max(...points.map((p) => p.x))) / 2;
  const box = draw(`${quality.title} beside ${axis === "file_bytes" ? "file size" : "time of a run"} of ${points.length} models`, 380, [{
    type: "scatter", mode: "markers+text", x: points.map((p) => p.x), y: points.map((p) => p.y),
    text: points.map((p) => tame(shorten(p.name, 28))), cliponaxis: false,
    // Names run towards the middle, and up and down in turn, so that neighbours stay apart.
    textposition: points.map((p, at) => `${at % 2 ? "bottom" : "top"} ${p.x > middle ? "left" : "right"}`),
    marker: { size: 13, color: points.map((p) => p.colour), symbol: points.map((p) => p.symbol), line: { width: 1, color: "#ffffff" } },
    customdata: points.map((p) => tame(`${p.name}: ${show(p.x)}, ${quality.title} ${figure(p.y)} ${quality.unit}`)),
    hovertemplate: "%{customdata}<extra></extra>",
  }], {
    margin: { l: 10, r: 20, t: 20, b: 45 },
    xaxis: {
      title: { text: axis === "file_bytes" ? "bytes of the file" : "milliseconds a run" }, automargin: true, rangemode: "tozero",
      fixedrange: true, zeroline: false, ...(axis === "file_bytes" ? { tickformat: "~s" } : {}),
    },
    yaxis: { title: { text: tame(quality.title + (quality.unit ? `, ${quality.unit}` : "")) }, automargin: true, fixedrange: true, zeroline: false, range: [least - room, top] },
  });
  queueMicrotask(() => box.on("plotly_click", (event) => {
    const at = DATA.outputs.findIndex((row) => row.name === points[event.points[0].pointNumber].name);
    if (at >= 0) choose(at);
  }));
  return box;
}
