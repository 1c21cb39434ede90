// What leaves the page: the tree as SVG and PNG, the chat as JSON.

import { s, themeColor } from "./dom.js";

const COPIED = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-family", "font-size", "font-weight"];
const MARGIN = 16;
const CAPTION = 26;

/** A drawing that needs no style sheet: computed styles as attributes, a background, a caption. */
export function standalone(svg, [width, height], caption) {
  const copy = svg.cloneNode(true);
  const originals = svg.querySelectorAll("path, rect, text");
  copy.querySelectorAll("path, rect, text").forEach((element, index) => {
    const style = getComputedStyle(originals[index]);
    for (const name of COPIED) element.setAttribute(name, style.getPropertyValue(name));
  });
  copy.querySelectorAll(".hit").forEach((element) => element.remove());
  for (const element of copy.querySelectorAll("*")) {
    const words = element.getAttribute("aria-label");
    if (words) element.prepend(s("title", {}, words));
    for (const name of ["class", "tabindex", "role", "data-index", "aria-label"]) element.removeAttribute(name);
  }
  const total = [width + 2 * MARGIN, height + 2 * MARGIN + CAPTION];
  return s(
    "svg",
    { xmlns: "http://www.w3.org/2000/svg", width: total[0], height: total[1], viewBox: `0 0 ${total[0]} ${total[1]}` },
    s("title", {}, caption),
    s("rect", { width: "100%", height: "100%", fill: themeColor("--card") }),
    s("g", { transform: `translate(${MARGIN} ${MARGIN})` }, ...copy.childNodes),
    s(
      "text",
      {
        ...{ x: MARGIN + 12, y: total[1] - MARGIN, "font-size": 12, "font-family": "system-ui, sans-serif" },
        fill: themeColor("--faint"),
      },
      caption,
    ),
  );
}

export function svgText(svg) {
  return `${new XMLSerializer().serializeToString(svg)}\n`;
}

/** The drawing as PNG, twice as fine. */
export async function toPng(svg) {
  const url = URL.createObjectURL(new Blob([svgText(svg)], { type: "image/svg+xml" }));
  try {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = 2 * image.width;
    canvas.height = 2 * image.height;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  } finally {
    URL.revokeObjectURL(url);
  }
}

export function download(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
