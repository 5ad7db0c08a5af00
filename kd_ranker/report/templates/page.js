"use strict";

// Text and grid take the page's colours, in light, dark and print.
function pageColours() {
  const style = getComputedStyle(document.documentElement);
  return { text: style.getPropertyValue("--text").trim(), line: style.getPropertyValue("--line").trim() };
}

function themed(layout) {
  const { text, line } = pageColours();
  const changes = { "font.color": text };
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis\d*$/.test(key)) {
      changes[`${key}.gridcolor`] = line;
      changes[`${key}.linecolor`] = line;
    }
  }
  return changes;
}

const charts = [];
for (const element of document.querySelectorAll(".chart")) {
  const source = element.querySelector("script");
  const { data, layout } = JSON.parse(source.textContent);
  source.remove();
  Plotly.newPlot(element, data, layout, { responsive: true, displayModeBar: false }).then(() =>
    Plotly.relayout(element, themed(layout)),
  );
  charts.push([element, layout]);
}

function recolour() {
  for (const [element, layout] of charts) Plotly.relayout(element, themed(layout));
}
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
window.matchMedia("print").addEventListener("change", recolour);

// A click on a column's title sorts by it, a second one the other way; empty cells stay last.
function sortBy(table, column, ascending) {
  const body = table.tBodies[0];
  const value = (row) => row.cells[column].dataset.value;
  const compare = (one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    return ascending ? order : -order;
  };
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
