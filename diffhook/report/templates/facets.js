// Checkboxes that narrow the samples down: of one facet any, of several all. Counts are of what the others leave.
for (const { name, of } of table?.facets ?? []) {
  const facet = document.getElementById(`facet-${name}`);
  const boxes = [...facet.querySelectorAll("input")];
  const rows = boxes.map((box) => box.closest("li"));
  const counts = rows.map((row) => row.querySelector(".number"));

  const choose = () => {
    const chosen = boxes.map((box) => box.checked);
    const any = chosen.some(Boolean);
    filters.set(name, any ? Uint8Array.from(of, (values) => (values.some((value) => chosen[value]) ? 1 : 0)) : null);
  };
  filters.watch(() => {
    const found = new Array(boxes.length).fill(0);
    for (let i = 0; i < of.length; i++) {
      if (filters.fitsBut(i, name)) for (const value of of[i]) found[value]++;
    }
    found.forEach((count, value) => {
      counts[value].textContent = count.toLocaleString("en");
      rows[value].classList.toggle("empty", count === 0);
    });
  });
  facet.addEventListener("change", choose);
  choose(); // a browser keeps ticks over a reload
}
const facetList = document.getElementById("facets");
if (facetList) {
  facetList.hidden = false;
  facetList.open = matchMedia("(min-width: 60rem)").matches;
}
