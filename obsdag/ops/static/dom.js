// Elements, and lists that keep theirs. Texts from users only ever become text nodes and attributes: never markup.

export const $ = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

// Makes the children of `parent` those of `items`, by key: elements that stay are updated in place, so that focus,
// selection and open details outlive an update.
export function sync(parent, items, key, make, update) {
  const known = parent.kept ?? (parent.kept = new Map());
  const wanted = new Map();
  let place = parent.firstElementChild;
  for (const [n, item] of items.entries()) {
    let id = String(key(item, n));
    while (wanted.has(id)) id += "'";
    let element = known.get(id);
    if (element === undefined) {
      element = make(item);
      element.dataset.key = id;
    }
    wanted.set(id, element);
    update(element, item);
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
  }
  for (const [id, element] of known) if (wanted.get(id) !== element) element.remove();
  parent.kept = wanted;
}

export function empty(parent, message) {
  sync(parent, [message], (each) => `empty:${each}`, (each) => el("li", { class: "none" }, each), () => {});
}

// A bar of shares. parts: [name, amount, title]; colors come from the classes s-NAME.
export function bar(element, parts) {
  const total = parts.reduce((sum, [, amount]) => sum + amount, 0);
  const shown = parts.filter(([, amount]) => amount > 0);
  sync(
    element,
    shown,
    ([name]) => name,
    ([name]) => el("span", { class: `s-${name}` }),
    (span, [, amount, title]) => {
      span.style.flexGrow = String(Math.max(amount / (total || 1), 0.004));
      span.title = title;
    },
  );
  element.setAttribute("aria-label", shown.map(([, , title]) => title).join(", ") || "nothing");
}
