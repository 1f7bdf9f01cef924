// The neighbourhood of a node: what feeds it and what reads it, before and after, as layers from left to right.

const MOST_DRAWN = 60;
const MOST_FOUND = 24;
const BOX = { width: 190, height: 62, across: 56, down: 18, edge: 12 };

/** Who feeds whom, by number. */
function links(graph) {
  if (!graph.links) {
    graph.links = { in: graph.nodes.map(() => []), out: graph.nodes.map(() => []) };
    graph.edges.forEach((edge) => {
      graph.links.out[edge[0]].push(edge);
      graph.links.in[edge[1]].push(edge);
    });
    graph.byName = new Map();
    graph.nodes.forEach((node, at) => graph.byName.has(node[0]) || graph.byName.set(node[0], at));
  }
  return graph.links;
}

/** Numbers of the nodes within some steps of one, nearest first; and how many were left out. */
function around(graph, start, steps) {
  const found = new Map([[start, 0]]);
  let rim = [start];
  let left = 0;
  for (let step = 1; step <= steps; step++) {
    const next = [];
    for (const at of rim)
      for (const other of [...links(graph).in[at].map((e) => e[0]), ...links(graph).out[at].map((e) => e[1])]) {
        if (found.has(other)) continue;
        if (found.size >= MOST_DRAWN) left++;
        else {
          found.set(other, step);
          next.push(other);
        }
      }
    rim = next;
  }
  return { numbers: [...found.keys()], left };
}

/** A column for each node (after all that feed it), and rows that keep neighbours near each other. */
function layers(graph, numbers) {
  const inside = new Set(numbers);
  const feeds = new Map(numbers.map((at) => [at, links(graph).in[at].map((e) => e[0]).filter((other) => inside.has(other))]));
  const column = new Map();
  const visit = (at) => {
    if (!column.has(at)) {
      column.set(at, 0); // guards against a cycle, which a broken file may have
      column.set(at, Math.max(-1, ...feeds.get(at).map(visit)) + 1);
    }
    return column.get(at);
  };
  numbers.forEach(visit);
  // A node that nothing feeds here stands just before its first reader.
  for (const at of numbers) {
    const readers = links(graph).out[at].map((e) => e[1]).filter((other) => inside.has(other));
    if (!feeds.get(at).length && readers.length) column.set(at, Math.min(...readers.map((other) => column.get(other))) - 1);
  }
  const first = Math.min(...column.values());
  const made = [];
  for (const [at, where] of column) (made[where - first] ||= []).push(at);
  const row = new Map();
  for (const layer of made) {
    if (!layer) continue;
    const wish = new Map(layer.map((at) => {
      const known = feeds.get(at).filter((other) => row.has(other)).map((other) => row.get(other));
      return [at, known.length ? known.reduce((a, b) => a + b, 0) / known.length : 0];
    }));
    layer.sort((a, b) => wish.get(a) - wish.get(b) || a - b);
    layer.forEach((at, index) => row.set(at, index - (layer.length - 1) / 2));
  }
  return { layers: made.map((layer) => layer || []), row };
}

/** An SVG of the neighbourhood; `other` is the graph on the other side, to mark what is only here. */
function drawing(title, graph, start, steps, other, mark, choose) {
  const { numbers, left } = around(graph, start, steps);
  const { layers: columns, row } = layers(graph, numbers);
  const most = Math.max(...columns.map((layer) => layer.length));
  const height = most * (BOX.height + BOX.down) + 2 * BOX.edge;
  const width = columns.length * (BOX.width + BOX.across) - BOX.across + 2 * BOX.edge;
  const place = new Map();
  columns.forEach((layer, at) => layer.forEach((number) =>
    place.set(number, [BOX.edge + at * (BOX.width + BOX.across), height / 2 + row.get(number) * (BOX.height + BOX.down) - BOX.height / 2])));
  const picture = svg("svg", { class: "graph", width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": title });
  const inside = new Set(numbers);
  for (const [from, to, value, type] of graph.edges) {
    if (!inside.has(from) || !inside.has(to)) continue;
    const [x1, y1] = [place.get(from)[0] + BOX.width, place.get(from)[1] + BOX.height / 2];
    const [x2, y2] = [place.get(to)[0], place.get(to)[1] + BOX.height / 2];
    const bend = Math.max(30, (x2 - x1) / 2);
    const far = columns.findIndex((l) => l.includes(to)) - columns.findIndex((l) => l.includes(from)) > 1;
    // An edge over several columns runs below the boxes between, where they are in its way.
    const dip = far && Math.abs(y1 - y2) < BOX.height ? BOX.height / 2 + BOX.down / 2 : 0;
    const path = dip
      ? `M${x1} ${y1} C${x1 + 30} ${y1} ${x1 + 10} ${y1 + dip} ${x1 + BOX.across} ${y1 + dip} L${x2 - BOX.across} ${y1 + dip} C${x2 - 10} ${y1 + dip} ${x2 - 30} ${y2} ${x2 - 6} ${y2}`
      : `M${x1} ${y1} C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2 - 6} ${y2}`;
    const line = svg("path", { class: "edge", d: path });
    line.append(svg("title", {}, `${visible(value)}: ${visible(type)}`));
    picture.append(line, svg("path", { class: "head", d: `M${x2 - 8} ${y2 - 4} L${x2} ${y2} L${x2 - 8} ${y2 + 4} Z` }));
  }
  for (const number of numbers) {
    const [name, op, constants, bytes, macs, kind] = graph.nodes[number];
    const [x, y] = place.get(number);
    const fresh = other && !other.byName.has(name);
    const sub = [op === "input" || op === "output" ? "" : bytes ? size(bytes) : "", macs ? `${amount(macs)} MACs` : ""].filter(Boolean).join(", ");
    const classes = ["node", kind === "node" ? "" : "end", fresh ? mark : "", number === start ? "chosen" : ""].filter(Boolean).join(" ");
    const label = `${op} ${visible(name)}${sub ? `, ${sub}` : ""}${number === start ? ", chosen" : ""}${fresh ? `, only ${mark === "added" ? "after" : "before"}` : ""}`;
    const group = svg("g", { class: classes, tabindex: "0", role: "button", "aria-label": label, "data-name": name,
      onclick: () => choose(name),
      onkeydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        choose(name, true);
      } });
    group.append(
      svg("title", {}, [`${op} ${visible(name)}`, sub, ...constants.map(visible)].filter(Boolean).join("\n")),
      svg("rect", { x, y, width: BOX.width, height: BOX.height, rx: 6 }),
      svg("text", { class: "op", x: x + 10, y: y + 19 }, visible(op)),
      svg("text", { x: x + 10, y: y + 36 }, visible(name)),
      svg("text", { class: "sub", x: x + 10, y: y + 53 }, sub));
    picture.append(group);
  }
  return { picture, left, count: numbers.length };
}

/** Leave out the middle of a text that is wider than its box. */
function fit(text) {
  const whole = text.textContent;
  const room = BOX.width - 18;
  const wide = text.getComputedTextLength();
  if (wide <= room) return;
  let letters = Math.floor((Array.from(whole).length * room) / wide) + 2;
  do text.textContent = shorten(whole, letters--);
  while (letters > 4 && text.getComputedTextLength() > room);
}

function neighbourhoods(output, state) {
  const before = DATA.reference && DATA.reference.graph;
  const after = output.graph;
  [before, after].forEach((graph) => graph && links(graph));
  const view = el("div", { "aria-live": "off" });
  const results = el("ul", { class: "results", "aria-label": "Nodes found" });
  const status = el("p", { class: "quiet", role: "status", "aria-live": "polite", id: "graph-status" });
  const steps = el("select", { id: "graph-steps", onchange: () => show() }, [1, 2, 3, 4].map((count) => el("option", { value: count, selected: count === 2 }, String(count))));

  function side(heading, graph, names, other, mark) {
    const name = names.find((each) => each !== null && graph.byName.has(each));
    if (name === undefined)
      return el("div", null, el("h3", null, heading), el("p", null, "There is no node of this name here: a pass removed, replaced or made it."));
    const { picture, left, count } = drawing(`${heading}: around ${visible(name)}`, graph, graph.byName.get(name), Number(steps.value), other, mark, choose);
    const details = graph.nodes[graph.byName.get(name)];
    return el("div", null, el("h3", null, heading),
      el("div", { class: "canvas", "data-side": mark }, picture),
      el("p", { class: "quiet" }, `${details[1]} `, named(name), details[2].length ? ": " : "",
        details[2].flatMap((text, at) => [at ? ", " : "", el("code", null, visible(text))])),
      left ? el("p", { class: "quiet" }, `${plural(count, "node")} drawn; ${left} more are not.`) : null);
  }
  function show(focus) {
    const names = state.names;
    view.replaceChildren(
      before ? side("Before", before, [names[1], names[0]], after, "gone")
        : el("div", null, el("h3", null, "Before"), note("The original was not at hand; name it with --reference.")),
      side("After", after, [names[0], names[1]], before, "added"));
    for (const text of view.querySelectorAll("svg.graph text")) fit(text);
    for (const canvas of view.querySelectorAll(".canvas")) {
      const chosen = canvas.querySelector("g.chosen rect");
      if (!chosen) continue;
      canvas.scrollLeft = Number(chosen.getAttribute("x")) + BOX.width / 2 - canvas.clientWidth / 2;
      canvas.scrollTop = Number(chosen.getAttribute("y")) + BOX.height / 2 - canvas.clientHeight / 2;
      if (focus && canvas.contains(chosen)) chosen.parentNode.focus({ preventScroll: true });
    }
    status.replaceChildren("Around ", el("bdi", null, visible(names[0])), `, ${plural(Number(steps.value), "step")} each way`);
  }
  function choose(name, focus) {
    state.names = [name, name];
    show(focus);
  }
  function search(event) {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    const seen = new Set();
    const found = !words.length ? [] : [...after.nodes, ...(before ? before.nodes : [])].filter((node) => {
      const text = `${node[0]} ${node[1]} ${node[2].join(" ")}`.toLowerCase();
      if (seen.has(node[0]) || !words.every((word) => text.includes(word))) return false;
      seen.add(node[0]);
      return true;
    });
    results.replaceChildren(...found.slice(0, MOST_FOUND).map((node) =>
      el("li", null, el("button", { type: "button", "data-name": node[0], onclick: () => choose(node[0]) }, `${node[1]} `, named(node[0])))));
    if (words.length) status.textContent = found.length > MOST_FOUND ? `${found.length} nodes found, ${MOST_FOUND} shown` : `${plural(found.length, "node")} found`;
  }
  // From the table of weights: the node may have another name before and after.
  neighbourhoods.choose = (nodeAfter, nodeBefore) => {
    state.names = [nodeAfter || nodeBefore, nodeBefore || nodeAfter];
    show();
    document.getElementById("h-graph").scrollIntoView({ block: "start" });
  };
  // First the largest weight, as the table has it.
  const first = output.sites.reduce((best, site) => ((site.bytes_after || 0) > (best ? best.bytes_after : 0) ? site : best), null);
  const [now, was] = first ? [first.node_after, first.node_before] : [null, null];
  const any = after.nodes.length ? after.nodes[0][0] : "";
  state.names = [now || was || any, was || now || any];
  queueMicrotask(() => show());
  return [
    el("p", null, "Values run from left to right. Choose a box to look around it."),
    before ? el("ul", { class: "legend", "aria-label": "Colours" },
      el("li", null, el("span", { class: "swatch", style: "background:var(--gone)" }), "only before"),
      el("li", null, el("span", { class: "swatch", style: "background:var(--added)" }), "only after")) : null,
    el("div", { class: "filters" },
      el("label", null, "Find a node by name, operator or constant", el("input", { type: "search", id: "graph-search", autocomplete: "off", oninput: search })),
      el("label", null, "Steps each way", steps)),
    results, status,
    after.hidden ? el("p", { class: "quiet" }, `${plural(after.hidden, "node")} inside subgraphs and functions are not drawn.`) : null,
    view,
  ].filter(Boolean);
}
