"use strict";
// A vertical line under the pointer, and the values of every series there, below the chart.
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg[data-x]");
  const output = figure.querySelector("output[data-points]");
  if (!svg || !output) continue;
  const series = JSON.parse(output.dataset.points);
  const [low, high] = svg.dataset.x.split(",").map(Number);
  const [left, right] = svg.dataset.plot.split(",").map(Number);
  const cross = svg.querySelector(".cross");
  const nearest = (xs, x) => {
    let first = 0, last = xs.length - 1;
    while (last - first > 1) {
      const middle = (first + last) >> 1;
      if (xs[middle] <= x) first = middle; else last = middle;
    }
    return Math.abs(xs[last] - x) < Math.abs(xs[first] - x) ? last : first;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const at = Math.min(right, Math.max(left, place));
    const x = low + (at - left) / (right - left) * (high - low);
    cross.setAttribute("x1", at);
    cross.setAttribute("x2", at);
    cross.style.visibility = "visible";
    const shown = series.map((line) => {
      const i = nearest(line.x, x);
      return `${line.label || "value"} ${line.y[i]} at ${line.x[i]}`;
    });
    output.textContent = shown.join("  ·  ");
  });
  svg.addEventListener("pointerleave", () => {
    cross.style.visibility = "hidden";
    output.textContent = "";
  });
}
