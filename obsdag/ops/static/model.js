// The graph as boxes that fit a screen: tasks, or groups of them by name, by depth, or in order.

export const MOST_BOXES = 48;
const MOST_BENDS = 300; // with more, edges go straight: a thicket is no clearer for being routed

// Longest distance of each task from a start, by index.
export function depths(nodes) {
  const depth = new Array(nodes.length).fill(0);
  const left = nodes.map((node) => node.up.length);
  const down = nodes.map(() => []);
  nodes.forEach((node, i) => node.up.forEach((up) => down[up].push(i)));
  const ready = nodes.map((_, i) => i).filter((i) => left[i] === 0);
  for (let at = 0; at < ready.length; at += 1) {
    const i = ready[at];
    for (const next of down[i]) {
      depth[next] = Math.max(depth[next], depth[i] + 1);
      left[next] -= 1;
      if (left[next] === 0) ready.push(next);
    }
  }
  return depth;
}

function collect(members, nameOf) {
  const groups = new Map();
  for (const i of members) {
    const name = nameOf(i);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(i);
  }
  return groups;
}

function byName(nodes, members, prefix) {
  return collect(members, (i) => {
    const rest = nodes[i].id.slice(prefix.length);
    const cut = rest.indexOf("/");
    return cut < 0 ? nodes[i].id : prefix + rest.slice(0, cut + 1);
  });
}

function byDepth(depth, members) {
  const levels = [...new Set(members.map((i) => depth[i]))].sort((a, b) => a - b);
  const size = Math.ceil(levels.length / MOST_BOXES);
  const place = new Map(levels.map((level, n) => [level, Math.floor(n / size)]));
  return collect(members, (i) => {
    const from = levels[place.get(depth[i]) * size];
    const to = levels[Math.min((place.get(depth[i]) + 1) * size, levels.length) - 1];
    return from === to ? `step ${from + 1}` : `steps ${from + 1} to ${to + 1}`;
  });
}

function inOrder(nodes, members) {
  const size = Math.ceil(members.length / MOST_BOXES);
  const sorted = [...members].sort((a, b) => nodes[a].id.localeCompare(nodes[b].id, undefined, { numeric: true }));
  const name = new Map();
  sorted.forEach((i, n) => {
    const start = n - (n % size);
    const end = Math.min(start + size, sorted.length) - 1;
    name.set(i, `${nodes[sorted[start]].id} \u2026 ${nodes[sorted[end]].id}`);
  });
  return collect(members, (i) => name.get(i));
}

function groupsOf(nodes, depth, members, prefix) {
  if (members.length <= MOST_BOXES) return collect(members, (i) => nodes[i].id);
  const named = byName(nodes, members, prefix);
  if (named.size > 1 && named.size <= MOST_BOXES) return named;
  if (named.size === 1) return groupsOf(nodes, depth, members, [...named.keys()][0]);
  const deep = byDepth(depth, members);
  return deep.size > 1 ? deep : inOrder(nodes, members);
}

// What to draw of `members`: boxes {name, members, group} and edges between them as pairs of box numbers.
export function boxesOf(nodes, depth, members, prefix = "") {
  const groups = groupsOf(nodes, depth, members, prefix);
  const boxes = [...groups].map(([name, own]) => ({
    name,
    members: own,
    group: own.length > 1 || nodes[own[0]].id !== name,
    depth: Math.min(...own.map((i) => depth[i])),
  }));
  const boxOf = new Map();
  boxes.forEach((box, n) => box.members.forEach((i) => boxOf.set(i, n)));
  const edges = new Set();
  for (const i of members)
    for (const up of nodes[i].up) {
      const from = boxOf.get(up), to = boxOf.get(i);
      if (from !== undefined && from !== to) edges.add(from * boxes.length + to);
    }
  return { boxes, edges: [...edges].map((code) => [Math.floor(code / boxes.length), code % boxes.length]) };
}

// Layers of a drawing: each box right of all that is before it. Long edges get a bend in each layer between, so that
// they run around boxes and not behind them. Cells are {box} or bends.
export function layersOf({ boxes, edges }) {
  const forward = edges.filter(([a, b]) => boxes[a].depth < boxes[b].depth);
  const layer = boxes.map(() => 0);
  const order = boxes.map((_, n) => n).sort((a, b) => boxes[a].depth - boxes[b].depth);
  const into = boxes.map(() => []);
  forward.forEach(([a, b]) => into[b].push(a));
  for (const n of order) layer[n] = Math.max(-1, ...into[n].map((a) => layer[a])) + 1;
  const layers = [];
  const put = (cell, at) => {
    while (layers.length <= at) layers.push([]);
    layers[at].push(cell);
    cell.layer = at;
    return cell;
  };
  const cells = boxes.map((box, n) => put({ box, n, before: [], after: [] }, layer[n]));
  const lines = [];
  const bends = forward.reduce((sum, [a, b]) => sum + layer[b] - layer[a] - 1, 0);
  for (const [a, b] of edges) {
    const line = [cells[a]];
    for (let at = layer[a] + 1; at < layer[b] && bends <= MOST_BENDS; at += 1) line.push(put({ box: null, before: [], after: [] }, at));
    line.push(cells[b]);
    if (layer[a] < layer[b])
      line.slice(1).forEach((cell, n) => {
        cell.before.push(line[n]);
        line[n].after.push(cell);
      });
    lines.push(line);
  }
  arrange(layers);
  return { layers, lines };
}

// Layers of more than `most` boxes stand in several rows, so that a fan-out of forty is a block and not a tower.
export function folded(layers, most) {
  return layers.flatMap((layer) => {
    const boxes = layer.filter((cell) => cell.box);
    if (boxes.length <= most) return [layer];
    const size = Math.ceil(boxes.length / Math.ceil(boxes.length / most));
    const rows = [];
    for (let at = 0; at < boxes.length; at += size) rows.push(boxes.slice(at, at + size));
    rows[0].push(...layer.filter((cell) => !cell.box));
    return rows;
  });
}

const mean = (cells, of) => cells.reduce((sum, cell) => sum + of(cell), 0) / cells.length;

// Fewer crossings: each layer is sorted by where its neighbours stand, to and fro.
function arrange(layers) {
  const number = (layer) => layer.forEach((cell, n) => (cell.at = n));
  layers.forEach(number);
  for (let sweep = 0; sweep < 8; sweep += 1) {
    const down = sweep % 2 === 0;
    for (const layer of down ? layers : [...layers].reverse()) {
      const wish = new Map(
        layer.map((cell) => {
          const near = down ? cell.before : cell.after;
          return [cell, near.length ? mean(near, (each) => each.at) : cell.at];
        }),
      );
      layer.sort((a, b) => wish.get(a) - wish.get(b));
      number(layer);
    }
  }
}

// Places along a layer: near the neighbours, apart by the sizes. size(cell) includes the gap. Returns the whole length.
export function place(layers, size) {
  for (const layer of layers) {
    let at = 0;
    for (const cell of layer) {
      cell.y = at + size(cell) / 2;
      at += size(cell);
    }
  }
  for (let sweep = 0; sweep < 12; sweep += 1) {
    const down = sweep % 2 === 0;
    for (const layer of down ? layers : [...layers].reverse()) settle(layer, size, down);
  }
  const low = Math.min(...layers.flat().map((cell) => cell.y - size(cell) / 2));
  layers.flat().forEach((cell) => (cell.y -= low));
  return Math.max(...layers.flat().map((cell) => cell.y + size(cell) / 2));
}

function settle(layer, size, down) {
  const wish = layer.map((cell) => {
    const near = down ? cell.before : cell.after;
    return near.length ? mean(near, (each) => each.y) : cell.y;
  });
  let low = -Infinity;
  const up = layer.map((cell, n) => {
    low = Math.max(wish[n], low + size(cell) / 2);
    const y = low;
    low += size(cell) / 2;
    return y;
  });
  let high = Infinity;
  for (let n = layer.length - 1; n >= 0; n -= 1) {
    high = Math.min(wish[n], high - size(layer[n]) / 2);
    layer[n].y = (up[n] + high) / 2;
    high -= size(layer[n]) / 2;
  }
}
