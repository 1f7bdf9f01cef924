// The table of weights: sorted by its headings, filtered, in pages.

const PAGE_ROWS = 50;
const MOST_PRINTED = 500;

const bitsOf = (site) => (site.bits === null ? "" : Number.isInteger(site.bits) ? String(site.bits) : site.bits.toFixed(2));
const groupOf = (site) => (site.group === null ? "" : site.group < 0 ? "channel" : String(site.group));
const errorOf = (site) => (site.equal ? "equal" : site.error_db === null ? "–" : `${site.error_db.toFixed(1)} dB`);
const storedOf = (site) => site.stored || (site.bytes_after === null ? "not found" : "");
const methodOf = (site) => site.method || "none";

// heading, class, key to sort by (numbers or texts; null is last), cell
const COLUMNS = [
  ["weight", "wide", (s) => s.name, null],
  ["operator", "", (s) => s.kind, (s) => s.kind],
  ["out × in", "figure", (s) => s.rows * s.columns, (s) => `${s.rows} × ${s.columns}`],
  ["method", "", (s) => s.method, methodOf],
  ["bits", "figure", (s) => s.bits, bitsOf],
  ["group", "figure", (s) => (s.group !== null && s.group < 0 ? Infinity : s.group), groupOf],
  ["SQNR", "figure", (s) => (s.equal ? Infinity : s.error_db), errorOf],
  ["before", "figure", (s) => s.bytes_before, (s) => size(s.bytes_before)],
  ["after", "figure", (s) => s.bytes_after, (s) => size(s.bytes_after)],
  ["stored as", "middle", (s) => s.stored, storedOf],
  ["why left alone", "wide", (s) => s.reason, (s) => visible(s.reason || "")],
];
const HINTS = {
  SQNR: "Signal to noise of the weight: as the pass measured it, or of the two files' weights",
  group: "Codes that share a scale",
};

function compareKeys(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function sitesTable(sites, choose) {
  sitesTable.beforePrint = sitesTable.afterPrint = null;
  if (!sites.length) return [el("p", null, "The model has no weights of the operators that passes work on.")];
  const state = { column: 8, down: true, page: 0, text: "", kind: "", method: "", bits: "", missed: false, chosen: null };
  const found = () => {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = sites.filter((site) => {
      if (state.kind && site.kind !== state.kind) return false;
      if (state.method && methodOf(site) !== state.method) return false;
      if (state.bits && bitsOf(site) !== state.bits) return false;
      if (state.missed && !site.reason) return false;
      if (!words.length) return true;
      const whole = [site.name, site.kind, site.node_before, site.node_after, storedOf(site), site.reason, ...site.done].join("\n").toLowerCase();
      return words.every((word) => whole.includes(word));
    });
    const key = COLUMNS[state.column][2];
    const sign = state.down ? -1 : 1;
    return rows.map((site) => [key(site), site]).sort(([a], [b]) => {
      const [noA, noB] = [a === null || a === undefined || a === "", b === null || b === undefined || b === ""];
      return noA || noB ? noA - noB : sign * compareKeys(a, b);
    }).map(([, site]) => site);
  };
  const body = el("tbody");
  const status = el("p", { class: "quiet", role: "status", "aria-live": "polite", id: "sites-status" });
  const headings = COLUMNS.map(([text, kind], at) =>
    el("th", { scope: "col", class: kind, title: HINTS[text] },
      el("button", { type: "button", onclick: () => sort(at) }, text)));
  const back = el("button", { type: "button", onclick: () => turn(-1) }, "Previous");
  const next = el("button", { type: "button", onclick: () => turn(1) }, "Next");

  function sort(at) {
    // Figures are wanted from the largest down first, texts from A to Z.
    state.down = state.column === at ? !state.down : COLUMNS[at][1] === "figure";
    state.column = at;
    state.page = 0;
    show();
  }
  function turn(by) {
    state.page += by;
    show();
    if (document.activeElement && document.activeElement.disabled) (by > 0 ? back : next).focus();
  }
  function line(site) {
    const node = site.node_after || site.node_before;
    const cells = COLUMNS.map(([text, kind, key, cell], at) => {
      if (at === 0) {
        const label = named(site.name);
        return el("th", { scope: "row", class: kind },
          node === null ? label : el("button", { type: "button", class: "link", title: "Show in the graph", onclick: () => { state.chosen = site; choose(site); show(); } }, label),
          site.done.length ? el("details", null, el("summary", { class: "quiet" }, plural(site.done.length, "remark")), el("ul", null, site.done.map((each) => el("li", null, visible(each))))) : null);
      }
      const made = el("td", { class: kind }, cell(site));
      const raw = key(site);
      if (raw !== null && raw !== undefined) made.dataset.value = raw;
      if (text === "SQNR" && site.error_from) made.title = site.error_from === "pass" ? "as the pass measured it" : "of the two files' weights";
      return made;
    });
    return el("tr", { class: state.chosen === site ? "chosen" : null }, cells);
  }
  function show(from, count) {
    const rows = found();
    const pages = Math.max(1, Math.ceil(rows.length / PAGE_ROWS));
    state.page = Math.min(Math.max(0, state.page), pages - 1);
    const start = from === undefined ? state.page * PAGE_ROWS : from;
    const part = rows.slice(start, start + (count || PAGE_ROWS));
    body.replaceChildren(...part.map(line));
    headings.forEach((heading, at) => {
      if (at === state.column) heading.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else heading.removeAttribute("aria-sort");
    });
    back.disabled = state.page === 0;
    next.disabled = state.page >= pages - 1;
    const all = rows.length === sites.length ? plural(sites.length, "weight") : `${rows.length} of ${plural(sites.length, "weight")}`;
    status.textContent = part.length === rows.length ? all : `${start + 1} to ${start + part.length} of ${all}`;
  }
  const pick = (text, name, values) => values.length < 2 ? null : el("label", null, text,
    el("select", { id: `filter-${name}`, onchange: (event) => { state[name] = event.target.value; state.page = 0; show(); } },
      el("option", { value: "" }, "all"), values.map((value) => el("option", { value }, visible(value)))));
  const several = (text) => [...new Set(sites.map(text))].filter(Boolean).sort((a, b) => compareKeys(a, b));
  const filters = el("div", { class: "filters", role: "search", "aria-label": "Filter the weights" },
    el("label", null, "Name or reason", el("input", { type: "search", id: "filter-text", autocomplete: "off", oninput: (event) => { state.text = event.target.value; state.page = 0; show(); } })),
    pick("Operator", "kind", several((s) => s.kind)),
    pick("Method", "method", several(methodOf)),
    pick("Bits", "bits", several(bitsOf)),
    sites.some((site) => site.reason)
      ? el("label", null, el("input", { type: "checkbox", id: "filter-missed", onchange: (event) => { state.missed = event.target.checked; state.page = 0; show(); } }), " only those left alone")
      : null);
  show();
  // What is printed is the table, not the page of it that happens to be on the screen.
  sitesTable.beforePrint = () => show(0, MOST_PRINTED);
  sitesTable.afterPrint = () => show();
  return [
    el("p", null, "Choose a heading to sort by it, a weight to see its neighbourhood in the graph."), filters, status,
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of weights" },
      el("table", { id: "sites-table", "aria-describedby": "sites-status" }, el("thead", null, el("tr", null, headings)), body)),
    sites.length > PAGE_ROWS ? el("p", { class: "pages" }, back, " ", next) : null,
  ].filter(Boolean);
}
