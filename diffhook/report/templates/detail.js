// One sample, opened: its picture in large, every reason in full, its copies, and the choice to leave it out.
class Detail {
  constructor(frame) {
    this.frame = frame;
    this.sample = -1;
    const on = (where, act) => frame.querySelector(where).addEventListener("click", act);
    on(".close", () => frame.close());
    on(".previous", () => this.turn(-1));
    on(".next", () => this.turn(1));
    frame.addEventListener("click", (event) => event.target === frame && frame.close()); // beside it
    this.box = frame.querySelector("input");
    this.box.addEventListener("change", () => excluded.set([this.sample], this.box.checked));
    frame.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) this.turn(by);
      if (event.key === "x") this.box.click();
    });
  }

  open(i) {
    this.order = gallery.found;
    this.show(i);
    if (!this.frame.open) this.frame.showModal();
  }

  turn(by) {
    const to = this.order[this.order.indexOf(this.sample) + by];
    if (to !== undefined) this.show(to);
  }

  show(i) {
    const find = (where) => this.frame.querySelector(where);
    this.sample = i;
    find("h3").replaceChildren(...breakable(tiles.title(i)));
    find(".score").textContent = `score ${tiles.data.scores[i]}`;
    const said = (tiles.data.reasons[i] ?? []).map(([, sentence]) => this.item(breakable(sentence)));
    find(".sentences").replaceChildren(...(said.length ? said : [this.item(["No reason to look at it."])]));
    const twins = (gallery.views.groups?.group.get(i) ?? []).filter((other) => other !== i).slice(0, Groups.most);
    find(".twins").hidden = twins.length === 0;
    find(".twins ol").replaceChildren(...twins.map((other) => this.item([this.twin(other)])));
    this.box.checked = excluded.has(i);
    const at = this.order.indexOf(i);
    find(".previous").disabled = at <= 0;
    find(".next").disabled = at < 0 || at === this.order.length - 1;
    this.picture(find(".body"), i);
  }

  item(content) {
    const made = document.createElement("li");
    made.append(...content);
    return made;
  }

  twin(i) {
    const button = Object.assign(document.createElement("button"), { type: "button" }), name = document.createElement("span");
    name.append(...breakable(shortened(tiles.title(i))));
    button.title = tiles.title(i);
    button.append(document.createElement("canvas"), name);
    button.addEventListener("click", () => this.show(i));
    tiles.draw(i, button.firstElementChild);
    return button;
  }

  // The one that the page has in large, or else out of the sheet.
  picture(place, i) {
    const own = tiles.made.get(i)?.querySelector("img");
    const made = own ? own.cloneNode() : Object.assign(document.createElement("canvas"), { className: "picture" });
    place.firstElementChild.remove();
    place.prepend(made);
    if (!own) tiles.draw(i, made);
  }
}
const detailFrame = document.getElementById("detail");
const detail = detailFrame && new Detail(detailFrame);
