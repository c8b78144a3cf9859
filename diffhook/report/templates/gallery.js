// Shows the samples that the filters leave, in an order; keeps the selection and hands it out as an exclude list.
const sheet = document.getElementById("atlas");
const atlas = sheet ? sheet.decode().then(() => sheet, () => null) : Promise.resolve(null);
const excluded = new Set(); // ranks
const controls = document.getElementById("gallery-controls");
let tiles = null;
if (table) {
  const pager = pagers.get("gallery");
  tiles = new Tiles(table, pager.items, document.getElementById("tile"), atlas, excluded);
  const count = table.ids.length;
  const all = [...table.ids.keys()];
  const orders = [all, ...table.keys, table.ids]; // as the menu names them
  const words = all.map((i) => (table.reasons[i] ?? []).flat().join(" ").toLowerCase());
  let found = all;

  const called = (i, find) =>
    String(table.ids[i]) === find.replace(/^#/, "") ||
    (table.listed[i] !== table.ids[i] && String(table.listed[i]).toLowerCase().includes(find));
  // Reasons name other samples: they are searched where no sample is called so.
  const search = (find) => {
    const tells = all.some((i) => called(i, find)) ? called : (i) => words[i].includes(find);
    return mask((i) => tells(i, find));
  };
  const mask = (keep) => Uint8Array.from({ length: count }, (_, i) => (keep(i) ? 1 : 0));

  const show = () => {
    const keys = orders[Number(controls.order.value)];
    found = all.filter((i) => filters.fits(i));
    if (keys !== all) found.sort((a, b) => (keys[a] ?? Infinity) - (keys[b] ?? Infinity) || a - b);
    pager.show(found, (i) => tiles.of(i));
    document.getElementById("gallery-empty").hidden = found.length > 0;
    document.getElementById("select-all").textContent = `Select all found (${found.length.toLocaleString("en")})`;
  };
  const narrow = () => {
    const find = controls.find.value.trim().toLowerCase();
    filters.set("find", find ? search(find) : null);
    filters.set("chosen", controls.chosen.checked ? mask((i) => excluded.has(i)) : null);
  };

  // As Ranking.excluded: the rows of a sample that stand out by themselves are left out as one.
  const names = () =>
    [...new Map([...excluded].map((i) => [table.ids[i], table.listed[i]]))].sort(([a], [b]) => a - b).map(([, name]) => name);
  const list = () => names().map((name) => name + "\n").join("");

  const bar = document.getElementById("selection");
  const tell = () => {
    const many = names().length;
    document.getElementById("selection-count").textContent =
      many ? `${many.toLocaleString("en")} ${many === 1 ? "sample" : "samples"} selected` : "Select what the next run should leave out";
    for (const name of ["select-none", "copy", "download"]) document.getElementById(name).disabled = !many;
    bar.classList.toggle("active", many > 0);
    document.dispatchEvent(new CustomEvent("excluded"));
  };
  const choose = (i, on) => {
    if (on) excluded.add(i);
    else excluded.delete(i);
    tiles.refresh(i);
  };
  const on = (name, act) => document.getElementById(name).addEventListener("click", act);

  pager.items.forEach((_, i) => choose(i, tiles.of(i).querySelector("input").checked)); // a browser keeps ticks over a reload
  document.getElementById("gallery").addEventListener("change", (event) => {
    choose(tiles.rank(event.target), event.target.checked);
    tell();
  });
  controls.addEventListener("input", (event) => (event.target.name === "order" ? show() : narrow()));
  controls.addEventListener("submit", (event) => event.preventDefault());
  on("select-all", () => { for (const i of found) choose(i, true); tell(); });
  on("select-none", () => { for (const i of [...excluded]) choose(i, false); tell(); });
  const copyLabel = document.getElementById("copy").textContent;
  on("copy", async () => {
    const button = document.getElementById("copy");
    try {
      await navigator.clipboard.writeText(list());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here: download";
    }
    setTimeout(() => { button.textContent = copyLabel; }, 2000);
  });
  on("download", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([list()], { type: "text/plain" }));
    link.download = "exclude.txt";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  controls.hidden = bar.hidden = false;
  tell();
  narrow();
  filters.watch(show);
}
