// Sorts and filters the samples; keeps the selection and hands it out as an exclude list.
const controls = document.getElementById("gallery-controls");
if (controls) {
  const pager = pagers.get("gallery");
  const samples = pager.items.map((tile) => ({
    tile,
    id: tile.dataset.sample,
    name: tile.dataset.name,
    keys: tile.dataset.keys.split("|").map((key) => (key === "" ? Infinity : Number(key))),
    kinds: tile.dataset.kinds ? tile.dataset.kinds.split("|") : [],
    words: tile.querySelector(".reasons")?.textContent.toLowerCase() ?? "",
    box: tile.querySelector("input"),
  }));
  const selected = new Set();
  let found = samples;

  const tells = ({ id, name, words }, find) =>
    id === find.replace(/^#/, "") || (name !== id && name.toLowerCase().includes(find)) || words.includes(find);
  const fits = (sample, { find, kind, chosen }) =>
    (!find || tells(sample, find)) &&
    (!kind || (kind === "*" ? sample.kinds.length > 0 : sample.kinds.includes(kind))) &&
    (!chosen || selected.has(sample));

  const refresh = () => {
    const order = Number(controls.order.value);
    const wanted = {
      find: controls.find.value.trim().toLowerCase(),
      kind: controls.kind.value,
      chosen: controls.chosen.checked,
    };
    found = samples.filter((sample) => fits(sample, wanted)).sort((a, b) => a.keys[order] - b.keys[order] || a.keys[0] - b.keys[0]);
    pager.show(found.map((sample) => sample.tile));
    document.getElementById("gallery-empty").hidden = found.length > 0;
  };

  // As Ranking.excluded: the rows of a sample that stand out by themselves are left out as one.
  const names = () =>
    [...new Map([...selected].map(({ id, name }) => [id, name]))].sort(([a], [b]) => a - b).map(([, name]) => name);
  const list = () => names().map((name) => name + "\n").join("");

  const bar = document.getElementById("selection");
  const count = () => {
    const many = names().length;
    document.getElementById("selection-count").textContent =
      many ? `${many.toLocaleString("en")} ${many === 1 ? "sample" : "samples"} selected` : "Select what the next run should leave out";
    for (const name of ["select-none", "copy", "download"]) document.getElementById(name).disabled = !many;
    bar.classList.toggle("active", many > 0);
  };
  const choose = (sample, on) => {
    sample.box.checked = on;
    sample.tile.classList.toggle("chosen", on);
    if (on) selected.add(sample);
    else selected.delete(sample);
  };
  const on = (name, act) => document.getElementById(name).addEventListener("click", act);

  for (const sample of samples) {
    choose(sample, sample.box.checked); // a browser keeps ticks over a reload
    sample.box.addEventListener("change", () => { choose(sample, sample.box.checked); count(); });
  }
  controls.addEventListener("input", refresh);
  controls.addEventListener("submit", (event) => event.preventDefault());
  on("select-all", () => { for (const sample of found) choose(sample, true); count(); });
  on("select-none", () => { for (const sample of samples) choose(sample, false); count(); });
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
  count();
}
