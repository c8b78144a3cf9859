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
  const groups = new Groups(table, tiles, excluded, document.getElementById("group"));
  const gallery = document.getElementById("gallery"), keepOne = document.getElementById("keep-one");
  const sizes = { large: pager.size, small: 4 * pager.size };
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
    const grouped = !keys;
    gallery.classList.toggle("grouped", grouped);
    pager.frame.dataset.noun = grouped ? "groups" : "samples";
    if (grouped) {
      groups.shown = groups.all.filter((members) => members.some((i) => filters.fits(i)));
      found = groups.shown.flat();
      pager.show(groups.shown, (members) => groups.of(members));
    } else {
      found = all.filter((i) => filters.fits(i));
      if (keys !== all) found.sort((a, b) => (keys[a] ?? Infinity) - (keys[b] ?? Infinity) || a - b);
      pager.show(found, (i) => tiles.of(i));
    }
    document.getElementById("select-all").hidden = grouped;
    keepOne.hidden = !grouped;
    keepOne.textContent = `Keep one of each group (select ${groups.spare().length.toLocaleString("en")})`;
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
    groups.refresh(i);
  };
  const on = (name, act) => document.getElementById(name).addEventListener("click", act);

  pager.items.forEach((_, i) => choose(i, tiles.of(i).querySelector("input").checked)); // a browser keeps ticks over a reload
  gallery.addEventListener("change", (event) => {
    choose(tiles.rank(event.target), event.target.checked);
    tell();
  });
  gallery.addEventListener("click", (event) => {
    if (event.target.matches(".look")) return detail.open(tiles.rank(event.target));
    const members = event.target.matches(".keep") && groups.members(event.target);
    if (!members) return;
    const spare = members.slice(1), on = !spare.every((i) => excluded.has(i));
    for (const i of spare) choose(i, on);
    tell();
  });
  on("keep-one", () => { for (const i of groups.spare()) choose(i, true); tell(); });
  detail.use({ tiles, groups, order: () => found, excluded, choose: (i, chosen) => { choose(i, chosen); tell(); } });
  const turnSize = () => {
    gallery.classList.toggle("dense", controls.tiles.value === "small");
    pager.resize(sizes[controls.tiles.value]);
  };
  controls.addEventListener("input", ({ target: { name } }) => (name === "order" ? show() : name === "tiles" ? turnSize() : narrow()));
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
  turnSize();
  // Who asks for copies alone sees them side by side, and for anything else one by one.
  filters.watch(() => {
    if (groups.all.length) groups.follow(controls.order);
    show();
  });
}
