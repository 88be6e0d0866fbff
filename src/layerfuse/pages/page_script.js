// Tables of the class "sortable": each head with data-sort becomes a button that sorts the rows.
function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}

function sortRows(table, heading, direction) {
  const column = heading.cellIndex;
  const byNumber = heading.dataset.sort === "number";
  const sign = direction === "ascending" ? 1 : -1;
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort((first, second) => {
    const a = valueOf(first, column);
    const b = valueOf(second, column);
    // What has no value stays below, whichever way the others go.
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (byNumber ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
  });
  table.tBodies[0].append(...rows);
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction);
}

for (const heading of document.querySelectorAll("table.sortable th[data-sort]")) {
  const name = heading.querySelector("span");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = name.textContent;
  name.replaceWith(button);
  button.addEventListener("click", () => {
    // Numbers start with the largest, names with the first.
    const first = heading.dataset.sort === "number" ? "descending" : "ascending";
    const other = first === "descending" ? "ascending" : "descending";
    const direction = heading.getAttribute("aria-sort") === first ? other : first;
    sortRows(heading.closest("table"), heading, direction);
  });
}

// Boxes whose content is wider say so, and fade at the right until they are at their end. The
// others are no stop for the keyboard.
function showWhatIsLeft(box) {
  const isWider = box.scrollWidth > box.clientWidth + 1;
  const left = box.scrollWidth - box.clientWidth - box.scrollLeft;
  box.classList.toggle("more", isWider && left > 1);
  box.previousElementSibling.hidden = !isWider;
  if (isWider) box.tabIndex = 0;
  else box.removeAttribute("tabindex");
}

const widths = new ResizeObserver((entries) => {
  for (const entry of entries) showWhatIsLeft(entry.target);
});
for (const box of document.querySelectorAll(".scroll")) {
  showWhatIsLeft(box);
  widths.observe(box);
  box.addEventListener("scroll", () => showWhatIsLeft(box), { passive: true });
}
