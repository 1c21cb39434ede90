// The two running charts, on uPlot (vendor/): colours are the page's own.

/* global uPlot */

import { themeColor as color } from "./dom.js";

const HEIGHT = 124;

function axis(options = {}) {
  return {
    stroke: color("--faint"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: color("--line"), width: 1 },
    ticks: { show: false },
    gap: 4,
    ...options,
  };
}

class Chart {
  #plot = null;
  #data = null;

  constructor(container) {
    this.container = container;
    new ResizeObserver(() => this.#resize()).observe(container);
  }

  /** data: of uPlot, columns; null where there is nothing to draw. */
  show(data) {
    this.#data = data;
    if (!data || !this.container.clientWidth) {
      this.#plot?.destroy();
      this.#plot = null;
    } else if (this.#plot) this.#plot.setData(data);
    else this.#plot = new uPlot(this.options(), data, this.container);
  }

  /** With the colours of now. */
  repaint() {
    const data = this.#data;
    this.show(null);
    this.show(data);
  }

  options() {
    return {
      width: this.container.clientWidth,
      height: HEIGHT,
      padding: [8, 16, 0, 0], // half of the last label, such as 2,000, stands right of the plot
      legend: { show: false },
      cursor: { show: false },
      scales: { x: { time: false }, y: { range: (_, low, high) => [0, Math.max(1, high) * 1.1] } },
      axes: [axis({ size: 24, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000] }), axis({ size: 40 })],
    };
  }

  #resize() {
    if (this.#plot) this.#plot.setSize({ width: this.container.clientWidth, height: HEIGHT });
    else if (this.#data) this.show(this.#data);
  }
}

/** Tokens per second by tokens written: this answer, plain as estimated (dashed), plain as measured. */
export class RateChart extends Chart {
  draw(answer) {
    const { x, y, plain } = answer.rateSeries();
    if (x.length < 2) return this.show(null);
    if (!answer.plain) return this.show([x, y, plain, x.map(() => null)]);
    const measured = answer.plain.rateSeries();
    return this.show(uPlot.join([[x, y, plain], [measured.x, measured.y]]));
  }

  options() {
    const line = { width: 2, points: { show: false }, spanGaps: true };
    return {
      ...super.options(),
      series: [
        {},
        { ...line, stroke: color("--accent"), fill: color("--accent-wash") },
        { ...line, stroke: color("--faint"), width: 1.5, dash: [5, 4] },
        { ...line, stroke: color("--ink") },
      ],
    };
  }
}

/** Tokens of each step as bars, their running mean, and the one that a plain step brings. */
export class StepChart extends Chart {
  draw(answer) {
    const { x, y, mean } = answer.stepSeries();
    this.show(x.length < 2 ? null : [x, y, mean, x.map(() => 1)]);
  }

  options() {
    const line = { width: 2, points: { show: false } };
    return {
      ...super.options(),
      series: [
        {},
        {
          fill: color("--accent-bar"),
          width: 0,
          points: { show: false },
          paths: uPlot.paths.bars({ size: [0.75, 14], radius: 0.2 }),
        },
        { ...line, stroke: color("--accent") },
        { ...line, stroke: color("--faint"), width: 1.5, dash: [5, 4] },
      ],
    };
  }
}
