"use strict";

// Without scripts, a chart is the image that stands in its place.
for (const element of document.querySelectorAll(".chart")) {
  const source = element.querySelector("script");
  const spec = JSON.parse(source.textContent);
  // On a phone, the answer and both first figures are on one screen.
  if (innerWidth <= 820) spec.height *= 0.6;
  // Legends do not wrap.
  if (element.clientWidth < 420) spec.config.legend.labelFontSize = 9;
  element.replaceChildren();
  vegaEmbed(element, spec, { actions: false, renderer: "svg" });
}

// Paper cannot be unfolded.
addEventListener("beforeprint", () => {
  for (const table of document.querySelectorAll("details.table")) table.open = true;
});

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
