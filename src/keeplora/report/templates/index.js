"use strict";
(() => {
  const table = document.querySelector("table.index"), body = table.tBodies[0], rows = [...body.rows];
  const shown = document.getElementById("shown"), filter = document.getElementById("filter");
  const collator = new Intl.Collator(undefined, {numeric: true, sensitivity: "base"});
  const heads = [...table.tHead.rows[0].cells];

  function sort(column, down) {
    const numeric = heads[column].dataset.numeric !== undefined;
    const value = row => row.cells[column].dataset.v ?? "";
    // A row without a value comes last, whichever way the others go.
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const way = numeric ? Number(x) - Number(y) : collator.compare(x, y);
      return down ? -way : way;
    };
    rows.sort(order);
    body.append(...rows);
    heads.forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }

  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      sort(i, now ? now === "ascending" : head.dataset.down !== undefined);
    });
  });

  const texts = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
  function narrow() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const row of rows) {
      row.hidden = !words.every(word => texts.get(row).includes(word));
      n += !row.hidden;
    }
    shown.textContent = n === rows.length ? `${n} rows` : `${n} of ${rows.length} rows`;
  }
  filter.addEventListener("input", narrow);
  document.getElementById("tools").hidden = false;
  narrow();
})();
