"use strict";
// Tables sort by a press on a column's title and show the rows that hold what is typed. What can be
// pressed is made here, so that without scripts nothing is there that does not work.

// From how many rows on it is worth it.
const SORTED = 3;
const FILTERED = 6;

// A first press sorts upwards, a second downwards, a third gives the order of the report back.
const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

for (const table of document.querySelectorAll(".table table")) {
  const rows = [...table.tBodies[0].rows]; // in the order of the report
  if (rows.length >= SORTED) makeSortable(table, rows);
  if (rows.length >= FILTERED) makeFiltered(table, rows);
}

function makeSortable(table, rows) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const direction = NEXT[title.getAttribute("aria-sort") ?? "none"];
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      if (direction !== "none") title.setAttribute("aria-sort", direction);
      table.tBodies[0].append(...sorted(rows, column, direction));
    });
  });
}

// Numbers by size where cells have them; where a row has none it comes last in both directions.
// Rows that are equal stay in the order of the report.
function sorted(rows, column, direction) {
  if (direction === "none") return rows;
  const sign = direction === "ascending" ? 1 : -1;
  const cells = new Map(rows.map((row) => [row, row.cells[column]]));
  const numeric = rows.some((row) => "value" in cells.get(row).dataset);
  const text = (row) => cells.get(row).textContent.trim();
  const number = (row) => Number(cells.get(row).dataset.value);
  const missing = (row) => (numeric ? !("value" in cells.get(row).dataset) : text(row) === "-");
  return [...rows].sort((a, b) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    return sign * (numeric ? number(a) - number(b) : compareWords(text(a), text(b)));
  });
}

// cuap-5 before cuap-10
function compareWords(a, b) {
  return a.localeCompare(b, "en", { numeric: true });
}

function makeFiltered(table, rows) {
  const kind = table.dataset.of; // runs, or plainly rows
  const controls = document.createElement("p");
  controls.className = "filter";
  const label = document.createElement("label");
  const input = document.createElement("input");
  input.type = "search";
  label.append(`Filter ${kind}`, input);
  const count = document.createElement("output");
  count.setAttribute("aria-live", "polite");
  controls.append(label, count);
  table.parentElement.before(controls);

  // Every word has to be there, anywhere in the row, in any case.
  function filter() {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = `${shown} of ${rows.length} ${kind}`;
  }
  input.addEventListener("input", filter);
  filter();
}
