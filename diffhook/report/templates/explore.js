// The map with its buttons. What is marked on it is a filter among the others.
class Exploration {
  constructor(map) {
    this.map = map;
    this.card = new Card(document.getElementById("card"));
    this.told = document.getElementById("marked");
    this.free = document.getElementById("unmark");
    this.gestures = new Gestures(map, {
      marked: (area) => this.mark(area),
      pointed: (i, at) => this.point(i, at),
      picked: (i, marks) => this.pick(i, marks),
      opened: (i) => detail.open(i),
    });
    this.listenToButtons();
    this.listenToGallery();
    filters.watch(() => this.tell());
    excluded.watch(() => map.redraw());
    new MutationObserver(() => map.readColours()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    system.addEventListener("change", () => map.readColours());
  }

  mark(area, mask = area && this.map.within(area)) {
    this.map.area = area;
    filters.set("marked", mask);
    this.map.redraw();
    this.tell();
  }

  // Selects a sample, or marks it, with a frame around it.
  pick(i, marks) {
    if (i < 0) return this.mark(null);
    if (!marks) return excluded.toggle([i]);
    const only = new Uint8Array(this.map.count);
    only[i] = 1;
    this.mark(this.map.around(i), only);
  }

  point(i, at) {
    this.map.near = i;
    if (i < 0) this.card.hide();
    else this.card.show(i, at, this.map.camera);
    this.map.redraw();
  }

  tell() {
    const { area, fitting, count } = this.map;
    const many = fitting.length.toLocaleString("en"), all = count.toLocaleString("en");
    this.told.textContent = area ? `${many} marked, shown below` : fitting.length < count ? `${many} of ${all} samples` : `${all} samples`;
    this.free.hidden = !area;
  }

  listenToButtons() {
    const on = (name, act) => document.getElementById(name).addEventListener("click", act);
    on("closer", () => this.gestures.zoom(1.6));
    on("further", () => this.gestures.zoom(1 / 1.6));
    on("whole", () => { this.map.camera.home(); this.map.redraw(); });
    on("mark-view", () => this.mark(this.gestures.view()));
    on("unmark", () => this.mark(null));
    const modes = document.getElementById("map-mode");
    const use = () => this.gestures.use(modes.querySelector("input:checked").value);
    modes.addEventListener("change", use);
    use();
  }

  // What is pointed at in the gallery is shown on the map.
  listenToGallery() {
    const gallery = document.getElementById("gallery");
    const show = (i) => { this.map.near = i; this.map.redraw(); };
    for (const name of ["pointerover", "focusin"]) gallery.addEventListener(name, (event) => show(tiles.rank(event.target) ?? -1));
    for (const name of ["pointerleave", "focusout"]) gallery.addEventListener(name, () => show(-1));
  }
}

if (document.getElementById("map")) {
  atlas.then((pictures) => {
    document.getElementById("map").hidden = false;
    new Exploration(new SampleMap(document.getElementById("stage"), table, pictures));
  });
}
