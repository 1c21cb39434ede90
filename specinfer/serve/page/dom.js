// Elements without markup: every string becomes a text node, so no text can be more than text.

const SVG = "http://www.w3.org/2000/svg";

/** h("button", {class: "x", onclick: act}, "Send"): an HTML element. */
export function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same for SVG. */
export function s(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** A colour of the style sheet in the theme that is on: light-dark() is one of two only where it is used. */
export function themeColor(name) {
  const probe = h("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

/** A probability in as few signs as say something: 0.93, 0.042, 3e-5, "none" where it is unknown. */
export function chance(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 0.9995) return "1.00";
  if (value >= 0.1) return value.toFixed(2);
  if (value >= 0.001) return value.toPrecision(2);
  return value === 0 ? "0" : value.toExponential(0);
}

/** A count or rate for reading: 0.52, 7.4, 143. */
export function short(value) {
  if (!Number.isFinite(value)) return "–";
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** A token with spaces and control characters that can be seen. */
export function visible(text) {
  const signs = { " ": "·", "\n": "⏎", "\t": "⇥" };
  return [...text]
    .map((char) => signs[char] ?? (/\p{C}/u.test(char) ? `\\x${char.codePointAt(0).toString(16).padStart(2, "0")}` : char))
    .join("");
}

/** What is short for a drafter: the last part of a path or name. */
export const shortName = (source) => source.split(/[/:]/).filter(Boolean).pop() ?? source;
