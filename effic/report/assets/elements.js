"use strict";
// Elements and figures. Text of a model reaches the page through textContent only, and plotly through `tame`.

const DATA = JSON.parse(document.getElementById("data").textContent);

/** An element with attributes ("on…" are listeners), and children that are elements or texts. */
function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Replace what a place holds. */
function fill(id, ...children) {
  document.getElementById(id).replaceChildren(...children.flat().filter((child) => child));
}

const note = (text) => el("p", { class: "note" }, visible(text));

/** A name whose control and direction characters show, so that it cannot pass for another. */
function visible(text) {
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "�");
}
const named = (text) => el("bdi", { class: "name" }, visible(text));

/** A text as plotly shows it literally: it takes some markup for its own. */
const tame = (text) => visible(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\$/g, "&#36;");

function shorten(text, width) {
  const letters = Array.from(visible(text));
  if (letters.length <= width) return letters.join("");
  const head = Math.floor((width - 1) / 3);
  return letters.slice(0, head).join("") + "…" + letters.slice(letters.length - (width - 1 - head)).join("");
}

const threeDigits = (value) => value.toFixed(Math.abs(value) >= 99.95 ? 0 : Math.abs(value) >= 9.995 ? 1 : 2);

function scaled(count, units) {
  let power = units.findIndex((_, at) => Math.abs(count) < 999.5 * 1000 ** (at + 1)) + 1;
  if (!power) power = units.length;
  return `${threeDigits(count / 1000 ** power)} ${units[power - 1]}`;
}
const size = (count) =>
  count === null ? "–" : Math.abs(count) < 1000 ? `${Math.round(count)} B` : scaled(count, ["kB", "MB", "GB", "TB"]);
const amount = (count) =>
  count === null ? "–" : Math.abs(count) < 10000 ? String(Math.round(count)) : scaled(count, ["k", "M", "G", "T"]);

function change(before, after) {
  if (!before || after === null) return "";
  const percent = (100 * (after - before)) / before;
  return `${percent > 0 ? "+" : percent < 0 ? "−" : ""}${Math.abs(percent).toFixed(1)}\u00a0%`;
}
function move(before, after, text) {
  if (before === null || before === undefined) return text(after);
  const [was, now] = [text(before), text(after)];
  return was === now ? now : `${was} → ${now}`;
}
function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 1e-3) return `${threeDigits(seconds * 1e6)} µs`;
  if (seconds < 1) return `${threeDigits(seconds * 1e3)} ms`;
  return seconds < 60 ? `${threeDigits(seconds)} s` : `${(seconds / 60).toFixed(1)} min`;
}
const figure = (value) => (value === null ? "–" : String(Number(value.toPrecision(4))));
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** A plain table: columns are [heading, class], cells are texts, elements or {content, value}. */
function table(caption, columns, rows, attributes) {
  const cell = (tag, content, kind) => {
    const plain = content !== null && typeof content === "object" && !(content instanceof Node);
    const made = el(tag, { class: kind, scope: tag === "th" ? "row" : null }, plain ? content.content : content);
    if (plain && content.value !== null && content.value !== undefined) made.dataset.value = content.value;
    return made;
  };
  return el(
    "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el(
      "table", attributes,
      el("caption", null, caption),
      el("thead", null, el("tr", null, columns.map(([text, kind]) => el("th", { scope: "col", class: kind }, text)))),
      el("tbody", null, rows.map((row) =>
        el("tr", row.attributes, row.cells.map((content, at) => cell(at ? "td" : "th", content, columns[at][1]))))),
    ),
  );
}
