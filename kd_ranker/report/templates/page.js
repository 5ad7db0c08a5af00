"use strict";

const charts = [...document.querySelectorAll(".chart")].map((element) => {
  const source = element.querySelector("script");
  source.remove();
  return { element, spec: JSON.parse(source.textContent), width: 0, drawn: Promise.resolve() };
});

// Legends do not wrap, so they get as many columns as their names leave room for. The height of a
// chart includes three rows of its legend; each other row adds to it.
function sizeOf(spec, width) {
  const names = spec.encoding?.color.scale.domain ?? [];
  const longest = Math.max(1, ...names.map((name) => name.length));
  const columns = Math.max(1, Math.floor(width / (6 * longest + 55)));
  const rows = Math.ceil(names.length / columns);
  return { columns, height: spec.height + 16 * Math.max(0, rows - 3) };
}

function draw(chart) {
  const { element, spec } = chart;
  chart.width = element.clientWidth;
  const { columns, height } = sizeOf(spec, chart.width);
  const legend = { ...spec.config.legend, columns };
  const sized = { ...spec, width: chart.width, height, config: { ...spec.config, legend } };
  chart.drawn = chart.drawn
    .then((view) => view?.finalize())
    .then(() => vegaEmbed(element, sized, { actions: false, renderer: "svg" }));
}

function drawResized() {
  for (const chart of charts) if (chart.width !== chart.element.clientWidth) draw(chart);
}

drawResized();
window.addEventListener("resize", drawResized);

// A click on a column's title sorts by it, a second one the other way; empty cells stay last.
function sortBy(table, column, ascending) {
  const text = (row) => row.cells[column].textContent.trim();
  // "−1,234 ± 5" is the number -1234.
  const number = (of) => Number(of.split(" ± ")[0].replace("−", "-").replace(/[,%]/g, ""));
  const compare = (one, other) => {
    const [a, b] = [text(one), text(other)];
    if (!a || !b) return !a - !b;
    const [x, y] = [number(a), number(b)];
    const order = isNaN(x) || isNaN(y) ? a.localeCompare(b) : x - y;
    return ascending ? order : -order;
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(compare));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button")?.addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sortBy(table, column, ascending);
    });
  });
}
