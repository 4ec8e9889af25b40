// The drawing of the graph: buttons over lines. It is laid out when what is shown changes, and only filled in on updates.

import { el, text } from "./dom.js";
import { count, quantile, rate } from "./format.js";
import { boxesOf, depths, folded, layersOf, place } from "./model.js";

const WIDE = { width: 158, height: 68, along: 44, across: 14, most: 6 };
const UPRIGHT = { width: 148, height: 68, along: 34, across: 12, most: 2 };
const TURN_PX = 620;
const LEAST_SCALE = 0.72; // a graph that is a little too wide is drawn smaller; one that is much too wide is scrolled
const SVG = "http://www.w3.org/2000/svg";

export class Graph {
  // chosen(task index or null): is called when a task was chosen, or chosen no longer.
  constructor(canvas, crumbs, note, chosen) {
    this.canvas = canvas;
    this.crumbs = crumbs;
    this.note = note;
    this.chosen = chosen;
    this.lines = document.createElementNS(SVG, "svg");
    this.lines.setAttribute("aria-hidden", "true");
    this.board = el("div", { class: "board" }, this.lines);
    this.sizer = el("div", { class: "sizer" }, this.board);
    canvas.append(this.sizer);
    this.path = [];
    this.buttons = [];
    this.selected = null;
    new ResizeObserver(() => this.nodes && (this.turned() ? this.layOut() : this.fit())).observe(canvas);
  }

  open(nodes) {
    this.nodes = nodes;
    this.rows = undefined;
    this.depth = depths(nodes);
    this.path = [];
    this.layOut();
  }

  get members() {
    return this.path.length ? this.path.at(-1).members : this.nodes.map((_, i) => i);
  }

  turned() {
    return this.nodes !== undefined && this.narrow() !== this.upright;
  }

  narrow() {
    return this.canvas.clientWidth > 0 && this.canvas.clientWidth < TURN_PX;
  }

  layOut() {
    this.upright = this.narrow();
    this.prefix = this.path.length && this.path.at(-1).name.endsWith("/") ? this.path.at(-1).name : "";
    this.shape = boxesOf(this.nodes, this.depth, this.members, this.prefix);
    const { layers, lines } = layersOf(this.shape);
    const form = (this.form = this.upright ? UPRIGHT : WIDE);
    const [thick, across] = this.upright ? [form.height, form.width] : [form.width, form.height];
    const rows = folded(layers, form.most);
    const length = place(rows, (cell) => (cell.box ? across : 0) + form.across);
    rows.forEach((row, n) => row.forEach((cell) => Object.assign(cell, { row: n, x: n * (thick + form.along) + thick / 2 })));
    this.size(rows.length * (thick + form.along) - form.along, length - form.across);
    this.draw(rows, lines, form.across / 2, thick);
    this.trail();
    if (this.rows) this.fill(this.rows, this.trouble, this.floor);
  }

  size(along, across) {
    [this.width, this.height] = (this.upright ? [across, along] : [along, across]).map(Math.ceil);
    this.board.style.width = `${this.width}px`;
    this.board.style.height = `${this.height}px`;
    this.lines.setAttribute("width", this.width);
    this.lines.setAttribute("height", this.height);
    this.fit();
  }

  fit() {
    const wanted = (this.canvas.clientWidth - 12) / this.width;
    const scale = wanted >= 1 || wanted <= 0 ? 1 : Math.max(wanted, LEAST_SCALE);
    this.board.style.transform = scale === 1 ? "" : `scale(${scale})`;
    this.sizer.style.width = `${Math.floor(this.width * scale)}px`;
    this.sizer.style.height = `${Math.ceil(this.height * scale)}px`;
  }

  draw(rows, lines, shift, thick) {
    const spot = (cell, end) => {
      const along = cell.x + (cell.box ? (end * thick) / 2 : 0), across = cell.y - shift;
      return this.upright ? [across, along] : [along, across];
    };
    this.buttons.forEach((button) => button.remove());
    const inOrder = rows.flatMap((row) => row.filter((cell) => cell.box));
    this.buttons = inOrder.map((cell) => this.button(cell, spot(cell, 0)));
    this.edges = lines.map((line) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("d", this.curve(line.map((cell, n) => [n ? spot(cell, -1) : null, spot(cell, 1)])));
      return { path, from: line[0].n, to: line.at(-1).n, far: line.length === 2 && line[1].row - line[0].row > 1 };
    });
    this.lines.replaceChildren(...this.edges.map((edge) => edge.path));
  }

  curve(points) {
    let found = `M${points[0][1]}`;
    for (let n = 1; n < points.length; n += 1) {
      const [x1, y1] = points[n - 1][1], [x2, y2] = points[n][0];
      const middle = this.upright ? (y1 + y2) / 2 : (x1 + x2) / 2;
      found += this.upright ? `C${x1},${middle} ${x2},${middle} ${x2},${y2}` : `C${middle},${y1} ${middle},${y2} ${x2},${y2}`;
    }
    return found;
  }

  button(cell, [x, y]) {
    const { box } = cell;
    const button = el("button", { type: "button", class: `box${box.group ? " group" : ""}`, onclick: () => this.press(box) });
    button.parts = {
      name: el("span", { class: "box-name" }, short(box.name, this.prefix)),
      kind: el("span", { class: "box-kind" }, this.kind(box.members[0])),
      now: el("span", { class: "box-now" }),
      pace: el("span", { class: "box-pace" }),
      bad: el("span", { class: "box-bad" }),
    };
    const { name, kind, now, pace, bad } = button.parts;
    const [first, last] = box.group ? [[name], [pace, bad]] : [[name, kind], [pace, bad]];
    button.append(el("span", { class: "box-row" }, ...first), now, el("span", { class: "box-row" }, ...last));
    const { width, height } = this.form;
    Object.assign(button.style, { left: `${x - width / 2}px`, top: `${y - height / 2}px`, width: `${width}px`, height: `${height}px` });
    button.box = box;
    this.board.append(button);
    return button;
  }

  kind(index) {
    return this.nodes[index].kind.replace(/^(async|sync|foreground)_?/, "");
  }

  press(box) {
    if (box.group) {
      this.path.push({ name: box.name, members: box.members });
      this.layOut();
      this.buttons[0]?.focus();
    } else {
      this.chosen(this.selected === box.members[0] ? null : box.members[0]);
    }
  }

  // One group up; whether there was one.
  up() {
    if (!this.path.length) return false;
    this.path.pop();
    this.layOut();
    this.buttons[0]?.focus();
    return true;
  }

  trail() {
    this.crumbs.hidden = this.path.length === 0;
    const whole = el("button", { type: "button", onclick: () => this.cut(0) }, "whole graph");
    const links = this.path.map((step, n) => el("button", { type: "button", onclick: () => this.cut(n + 1), "aria-current": n + 1 === this.path.length ? "location" : null }, step.name));
    this.crumbs.replaceChildren(whole, ...links.flatMap((link) => [" \u203a ", link]));
    const groups = this.shape.boxes.filter((box) => box.group).length;
    text(this.note, groups ? `${count(this.members.length)} tasks in ${this.shape.boxes.length} boxes; open one to see inside` : "");
  }

  cut(length) {
    this.path.length = length;
    this.layOut();
  }

  select(index) {
    this.selected = index;
    for (const button of this.buttons) {
      const on = index !== null && button.box.members.includes(index);
      button.setAttribute("aria-pressed", String(on && !button.box.group));
      button.classList.toggle("holds", on && button.box.group);
    }
  }

  // rows: numbers by task; trouble(index): whether it failed within the last minute.
  fill(rows, trouble, floor) {
    this.rows = rows;
    this.floor = floor;
    this.trouble = trouble;
    const active = this.buttons.map((button) => this.show(button, sum(button.box.members, rows), trouble));
    const busy = new Map(this.buttons.map((button, n) => [this.shape.boxes.indexOf(button.box), active[n]]));
    for (const { path, from, to, far } of this.edges)
      path.setAttribute("class", `${busy.get(from) && busy.get(to) ? "busy" : ""} ${far ? "far" : ""}`.trim());
    this.select(this.selected);
  }

  show(button, numbers, trouble) {
    const { now, pace, bad } = button.parts;
    const bits = [];
    if (numbers.running) bits.push(`${count(numbers.running)} running`);
    if (numbers.waiting) bits.push(`${count(numbers.waiting)} waiting`);
    text(now, bits.join(" \u00b7 ") || (numbers.done ? `${count(numbers.done)} done` : "not used yet"));
    const size = button.box.group ? `${count(button.box.members.length)} tasks` : "";
    const paced = numbers.rate ? `${rate(numbers.rate)} \u00b7 p95 ${quantile(numbers.p95, this.floor)}` : bits.length && numbers.done ? `${count(numbers.done)} done` : "";
    text(pace, size ? [numbers.rate ? rate(numbers.rate) : "", size].filter(Boolean).join(" \u00b7 ") : paced);
    text(bad, numbers.failed ? `\u2715 ${count(numbers.failed)}` : "");
    const failing = button.box.members.some(trouble);
    button.classList.toggle("failing", failing);
    button.classList.toggle("running", !failing && numbers.running > 0);
    button.classList.toggle("waiting", !failing && !numbers.running && numbers.waiting > 0);
    button.classList.toggle("unused", !numbers.running && !numbers.waiting && !numbers.done);
    const said = [button.box.name, now.textContent, pace.textContent, numbers.failed ? `${count(numbers.failed)} failed` : ""];
    button.title = said.filter(Boolean).join("\n");
    return numbers.running > 0 || numbers.rate > 0;
  }
}

function short(name, prefix) {
  return prefix && name.startsWith(prefix) && name.length > prefix.length ? name.slice(prefix.length) : name;
}

export function sum(members, rows) {
  const found = { running: 0, waiting: 0, done: 0, failed: 0, retried: 0, rate: 0, p95: null };
  for (const i of members) {
    const row = rows[i];
    found.running += row.running;
    found.waiting += row.waiting;
    found.done += row.executions;
    found.failed += row.failed;
    found.retried += row.retried;
    found.rate += row.rate ?? 0;
    if (row.p95_s !== null && (found.p95 === null || row.p95_s > found.p95)) found.p95 = row.p95_s;
  }
  return found;
}
