"use strict";
// A crosshair and the values below it. The page is whole without this script.
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), tip = figure.querySelector(".tip"), cross = figure.querySelector(".cross");
  const left = LEFT, right = WIDTH - RIGHT;
  const nearest = (points, x) => {
    let a = 0, b = points.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (points[m][0] < x) a = m; else b = m; }
    return Math.abs(points[a][0] - x) <= Math.abs(points[b][0] - x) ? points[a] : points[b];
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = Math.min(right, Math.max(left, (event.clientX - box.left) / box.width * WIDTH));
    const x = data.x[0] + (px - left) / (right - left) * (data.x[1] - data.x[0]);
    cross.setAttribute("x1", px); cross.setAttribute("x2", px);
    tip.replaceChildren(...data.lines.map((line) => {
      const [step, value] = nearest(line.points, x), row = document.createElement("div"), dot = document.createElement("i");
      dot.className = "dot c" + line.color;
      row.append(dot, `${line.name ? line.name + " " : ""}${value} at ${step}`);
      return row;
    }));
    cross.style.visibility = tip.style.visibility = "visible";
    const at = px / WIDTH * box.width;
    tip.style.left = Math.max(4, Math.min(at + 22, figure.clientWidth - tip.offsetWidth - 6)) + "px";
  });
  svg.addEventListener("pointerleave", () => { cross.style.visibility = tip.style.visibility = "hidden"; });
}
