// Hands on the map: drag, wheel, pinch and keys become moves of the camera and marked areas.
class Gestures {
  constructor(map, { marked, pointed, picked, opened }) {
    Object.assign(this, { map, marked, pointed, picked, opened });
    this.stage = map.stage;
    this.mode = "move";
    this.fingers = new Map();
    this.drag = null;
    this.scrolled = -Infinity;
    addEventListener("scroll", () => { this.scrolled = performance.now(); }, { passive: true });
    this.stage.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    for (const name of ["pointerdown", "pointermove", "pointerup", "pointercancel", "pointerleave"]) {
      this.stage.addEventListener(name, (event) => this[name]?.(event));
    }
    this.stage.addEventListener("dblclick", (event) => this.dblclick(event));
    this.stage.addEventListener("keydown", (event) => this.keydown(event));
  }

  use(mode) {
    this.mode = mode;
    this.stage.dataset.mode = mode;
  }

  place(event) {
    const box = this.stage.getBoundingClientRect();
    return [event.clientX - box.left - this.stage.clientLeft, event.clientY - box.top - this.stage.clientTop];
  }

  // A page that is being scrolled goes on scrolling when the map comes under the pointer.
  wheel(event) {
    if (!event.ctrlKey && performance.now() - this.scrolled < 250) return;
    event.preventDefault();
    const step = event.deltaMode === 1 ? event.deltaY * 16 : event.deltaY;
    this.zoom(Math.exp(-Math.min(Math.max(step, -200), 200) * (event.ctrlKey ? 0.01 : 0.0025)), ...this.place(event));
  }

  zoom(factor, left = this.map.camera.width / 2, top = this.map.camera.height / 2) {
    this.map.camera.zoomAt(factor, left, top);
    this.map.redraw();
  }

  pointerdown(event) {
    if (event.button > 0) return;
    this.stage.setPointerCapture(event.pointerId);
    const at = this.place(event);
    this.fingers.set(event.pointerId, at);
    this.pointed(-1);
    if (this.fingers.size > 1) return this.letGo();
    const marks = this.mode !== "move" || event.shiftKey;
    this.drag = { from: at, last: at, moved: false, shape: marks ? (this.mode === "lasso" ? "lasso" : "box") : null, path: [at] };
  }

  pointermove(event) {
    const at = this.place(event);
    if (!this.fingers.has(event.pointerId)) return this.pointed(this.map.at(...at), at);
    if (this.fingers.size > 1) return this.pinch(event.pointerId, at);
    this.fingers.set(event.pointerId, at);
    const { drag } = this;
    if (!drag) return;
    drag.moved ||= Math.hypot(at[0] - drag.from[0], at[1] - drag.from[1]) > 4;
    if (!drag.moved) return;
    if (drag.shape) {
      drag.path.push(at);
      this.map.area = this.corners(drag, at);
    } else this.map.camera.pan(at[0] - drag.last[0], at[1] - drag.last[1]);
    drag.last = at;
    this.map.redraw();
  }

  corners({ shape, from, path }, at) {
    const points = shape === "lasso" ? path : [from, [at[0], from[1]], at, [from[0], at[1]]];
    return points.map((point) => this.map.camera.toMap(...point));
  }

  pinch(finger, at) {
    const [, other] = [...this.fingers].find(([id]) => id !== finger);
    const before = this.fingers.get(finger);
    const apart = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
    this.map.camera.pan((at[0] - before[0]) / 2, (at[1] - before[1]) / 2);
    this.fingers.set(finger, at);
    this.zoom(apart(at) / apart(before), (at[0] + other[0]) / 2, (at[1] + other[1]) / 2);
  }

  pointerup(event) {
    this.fingers.delete(event.pointerId);
    const { drag } = this;
    this.drag = null;
    if (!drag) return;
    if (!drag.moved) this.picked(this.map.at(...drag.from), drag.shape !== null);
    else if (drag.shape) this.marked(this.map.area);
  }

  dblclick(event) {
    const i = event.shiftKey ? -1 : this.map.at(...this.place(event));
    if (i >= 0) this.opened(i);
  }

  pointercancel(event) {
    this.fingers.delete(event.pointerId);
    this.letGo();
  }

  pointerleave() {
    this.pointed(-1);
  }

  letGo() {
    if (this.drag?.shape) this.marked(null);
    this.drag = null;
  }

  keydown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { camera } = this.map, far = event.shiftKey ? 200 : 50;
    const moves = {
      ArrowLeft: () => camera.pan(far, 0),
      ArrowRight: () => camera.pan(-far, 0),
      ArrowUp: () => camera.pan(0, far),
      ArrowDown: () => camera.pan(0, -far),
      "+": () => this.zoom(1.5),
      "=": () => this.zoom(1.5),
      "-": () => this.zoom(1 / 1.5),
      0: () => camera.home(),
      Enter: () => this.marked(this.view()),
      Escape: () => this.marked(null),
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    moves[event.key]();
    this.map.redraw();
  }

  // The corners of all that is in view.
  view() {
    const { width, height } = this.map.camera;
    return this.corners({ shape: "box", from: [0, 0] }, [width, height]);
  }
}
