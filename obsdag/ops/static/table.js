// The table of tasks: searched, narrowed and sorted over all of them, drawn for the first few only.

import { $, el, sync, text } from "./dom.js";
import { count, duration, quantile, rate } from "./format.js";

const PAGE = 40;
const COLUMNS = [
  ["id", "Task"], ["running", "Running"], ["waiting", "Waiting"], ["executions", "Done"], ["rate", "Rate"],
  ["mean_s", "Mean"], ["p95_s", "p95"], ["failed", "Failed"], ["retried", "Retried"],
];
const ONLY = {
  all: () => true,
  active: (row) => row.running > 0 || row.waiting > 0 || row.rate > 0,
  waiting: (row) => row.waiting > 0,
  failing: (row) => row.failed > 0 || row.retried > 0,
};

export class Table {
  constructor(chosen) {
    this.chosen = chosen;
    this.only = "all";
    this.sort = { by: null, down: true };
    this.most = PAGE;
    this.selected = null;
    $("tasks-head").replaceChildren(...COLUMNS.map(([id, name]) => el("th", { scope: "col", "data-column": id }, el("button", { type: "button", onclick: () => this.sortBy(id) }, name))));
    $("only").replaceChildren(...Object.keys(ONLY).map((name) => el("button", { type: "button", "data-only": name, "aria-pressed": String(name === "all"), onclick: () => this.narrow(name) }, name)));
    $("search").addEventListener("input", () => this.again());
    $("tasks-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const first = this.found()[0];
      if (first !== undefined) this.chosen(first);
    });
    $("tasks-more").addEventListener("click", () => {
      this.most += 10 * PAGE;
      this.draw();
    });
  }

  open(nodes) {
    this.nodes = nodes;
    this.rows = undefined;
    this.names = nodes.map((node) => node.id.toLowerCase());
    this.most = PAGE;
  }

  sortBy(id) {
    const same = this.sort.by === id;
    if (same && !this.sort.first) this.sort = { by: null, down: true };
    else this.sort = { by: id, down: same ? !this.sort.down : id !== "id", first: !same };
    this.draw();
  }

  narrow(name) {
    this.only = name;
    for (const button of $("only").children) button.setAttribute("aria-pressed", String(button.dataset.only === name));
    this.again();
  }

  again() {
    this.most = PAGE;
    this.draw();
  }

  fill(rows, floor) {
    this.rows = rows;
    this.floor = floor;
    this.draw();
  }

  found() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const keep = ONLY[this.only];
    const found = [];
    for (let i = 0; i < this.nodes.length; i += 1)
      if (keep(this.rows[i]) && words.every((word) => this.names[i].includes(word))) found.push(i);
    const { by, down } = this.sort;
    if (by === "id") found.sort((a, b) => this.names[a].localeCompare(this.names[b], undefined, { numeric: true }));
    else if (by !== null) found.sort((a, b) => (this.rows[a][by] ?? -1) - (this.rows[b][by] ?? -1));
    return by !== null && down ? found.reverse() : found;
  }

  draw() {
    if (this.rows === undefined) return;
    const found = this.found();
    const shown = found.slice(0, this.most);
    text($("tasks-note"), found.length === this.nodes.length ? `${count(found.length)}` : `${count(found.length)} of ${count(this.nodes.length)}`);
    for (const th of $("tasks-head").children)
      th.setAttribute("aria-sort", th.dataset.column === this.sort.by ? (this.sort.down ? "descending" : "ascending") : "none");
    sync($("tasks-body"), shown, (i) => i, (i) => this.make(i), (tr, i) => this.update(tr, this.rows[i], i));
    $("tasks-more").hidden = shown.length === found.length;
    text($("tasks-more"), `Show more (${count(found.length - shown.length)} left)`);
  }

  make(i) {
    const { id, kind } = this.nodes[i];
    const name = el("td", {}, el("button", { type: "button", onclick: () => this.chosen(this.selected === i ? null : i), title: id }, id));
    if (kind !== "async") name.append(el("small", {}, kind));
    return el("tr", {}, name, ...COLUMNS.slice(1).map(() => el("td")));
  }

  update(tr, row, i) {
    tr.className = i === this.selected ? "on" : "";
    const cell = (n, value, kind) => {
      text(tr.children[n], value);
      tr.children[n].className = kind;
    };
    const number = (n, value, kind = "") => cell(n, count(value), value ? kind : "zero");
    number(1, row.running, "busy");
    number(2, row.waiting);
    number(3, row.executions);
    cell(4, rate(row.rate), row.rate ? "" : "zero");
    cell(5, duration(row.mean_s), row.mean_s === null ? "zero" : "");
    cell(6, quantile(row.p95_s, this.floor), row.p95_s === null ? "zero" : "");
    number(7, row.failed, "bad");
    number(8, row.retried);
  }

  select(index) {
    this.selected = index;
    this.draw();
  }
}
