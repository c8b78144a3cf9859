// The map's buttons, its card, and what is marked on it: a filter among the others.
const stage = document.getElementById("stage");
if (stage) {
  atlas.then((picture) => {
    const figure = document.getElementById("map");
    figure.hidden = false;
    const map = new SampleMap(stage, table, picture);
    const card = document.getElementById("card");
    const told = document.getElementById("marked");
    const free = document.getElementById("unmark");

    const say = () => {
      const many = map.fitting.length.toLocaleString("en"), all = map.count.toLocaleString("en");
      told.textContent = map.area ? `${many} marked, shown below` : map.fitting.length < map.count ? `${many} of ${all} samples` : `${all} samples`;
      free.hidden = !map.area;
    };
    const mark = (area) => {
      map.area = area;
      filters.set("marked", area && map.within(area));
      map.redraw();
      say();
    };
    const pick = (i) => {
      if (i < 0) return mark(null);
      const only = new Uint8Array(map.count);
      only[i] = 1;
      const [left, top] = map.camera.toView(map.x[i], map.y[i]), half = map.size(map.camera.zoom) / 2 + 5;
      map.area = [[-1, -1], [1, -1], [1, 1], [-1, 1]].map(([right, down]) => map.camera.toMap(left + right * half, top + down * half));
      filters.set("marked", only);
      say();
    };
    const point = (i, at) => {
      map.near = i;
      card.hidden = i < 0;
      if (i >= 0) describe(i, at);
      map.redraw();
    };
    const describe = (i, [left, top]) => {
      if (card.dataset.of !== String(i)) {
        card.dataset.of = i;
        const canvas = Object.assign(document.createElement("canvas"), { className: "picture" });
        card.replaceChildren(canvas, Object.assign(document.createElement("b"), { textContent: `${document.body.dataset.named ? "" : "#"}${table.names[i]}` }),
          Object.assign(document.createElement("span"), { textContent: `score ${table.scores[i]}` }));
        for (const [brief] of table.reasons[i] ?? []) card.append(Object.assign(document.createElement("span"), { className: "chip", textContent: brief }));
        tiles.draw(i, canvas);
      }
      const { width, height } = map.camera, gap = 16;
      card.style.left = `${left + gap + card.offsetWidth > width ? Math.max(left - gap - card.offsetWidth, 4) : left + gap}px`;
      card.style.top = `${Math.min(Math.max(top - card.offsetHeight / 2, 4), Math.max(height - card.offsetHeight - 4, 4))}px`;
    };

    const gestures = new Gestures(map, { marked: mark, pointed: point, picked: pick });
    const on = (name, act) => document.getElementById(name).addEventListener("click", act);
    on("closer", () => gestures.zoom(1.6));
    on("further", () => gestures.zoom(1 / 1.6));
    on("whole", () => { map.camera.home(); map.redraw(); });
    on("mark-view", () => mark(gestures.view()));
    free.addEventListener("click", () => mark(null));
    const modes = document.getElementById("map-mode");
    const use = () => gestures.use(modes.querySelector("input:checked").value);
    modes.addEventListener("change", use);
    use();

    // What the gallery points at is shown on the map.
    const gallery = document.getElementById("gallery");
    const show = (event) => {
      map.near = tiles.rank(event.target) ?? -1;
      map.redraw();
    };
    for (const name of ["pointerover", "focusin"]) gallery.addEventListener(name, show);
    gallery.addEventListener("pointerleave", () => { map.near = -1; map.redraw(); });

    document.addEventListener("excluded", () => map.redraw());
    filters.watch(say);
    new MutationObserver(() => map.readColours()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    system.addEventListener("change", () => map.readColours());
  });
}
