// The map: draws samples where they lie, and says which of them were marked.
class SampleMap {
  constructor(stage, data, atlas) {
    this.stage = stage;
    this.canvas = stage.querySelector("canvas");
    this.context = this.canvas.getContext("2d");
    this.atlas = atlas;
    this.cells = data.cells;
    this.cellSize = data.atlas?.cell ?? 0;
    this.columns = data.atlas?.columns ?? 1;
    this.count = data.ids.length;
    [this.x, this.y] = data.places.map((side) => Float32Array.from(side, (value) => value / 10000));
    this.flagged = Uint8Array.from(data.ids, (_, i) => (data.reasons[i] ? 1 : 0));
    this.camera = new Camera();
    this.crowd = new Crowd(this.x, this.y);
    this.area = null; // what is marked, as corners on the map
    this.near = -1; // the sample under the pointer
    this.seen = []; // pictures of the last frame, the uppermost last
    this.readColours();
    new ResizeObserver(() => this.resize()).observe(stage);
    filters.watch(() => this.arrange());
  }

  // A picture grows more slowly than the map does.
  size = (zoom) => {
    const room = Math.sqrt((this.camera.width * this.camera.height) / Math.max(this.count, 1)) * 0.55;
    const first = Math.min(Math.max(room, this.camera.width < 500 ? 18 : 22), 44);
    return Math.min(first * zoom ** 0.35, Math.max(this.cellSize * 2, 64));
  };

  resize() {
    const { clientWidth: width, clientHeight: height } = this.stage;
    if (!width || !height) return;
    this.ratio = Math.min(devicePixelRatio, 2);
    Object.assign(this.canvas, { width: Math.round(width * this.ratio), height: Math.round(height * this.ratio) });
    Object.assign(this.camera, { width, height });
    this.arrange();
  }

  arrange() {
    this.fitting = [];
    for (let i = 0; i < this.count; i++) if (filters.fits(i)) this.fitting.push(i);
    this.crowd.arrange(this.fitting, this.camera, this.size);
    this.redraw();
  }

  // Canvas knows no light-dark(): the legend's marks have the colours.
  readColours() {
    const of = (name) => getComputedStyle(this.stage.querySelector(`.ink-${name}`)).color;
    this.colours = Object.fromEntries(["plain", "flagged", "marked", "faint", "paper"].map((name) => [name, of(name)]));
    this.redraw();
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  draw() {
    const { context, camera } = this;
    if (!this.ratio) return;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, camera.width, camera.height);
    const size = this.size(camera.zoom), level = Math.min(Crowd.levelAt(camera.zoom), Crowd.last);
    const { pictures, dots } = this.drawDots(size, level);
    this.drawPiles(pictures, dots, size);
    this.drawPictures(pictures, size);
    Object.assign(this, { seen: pictures, seenSize: size });
    if (this.near >= 0) this.drawNear(size);
    if (this.area) this.outline(this.area);
    this.stage.dispatchEvent(new CustomEvent("drawn"));
  }

  // Everyone without room for a picture, those that the filters leave out first. Returns what fits the filters:
  // [sample, left, top, …] of the pictures to be drawn, and [left, top, …] of the dots.
  drawDots(size, level) {
    const { context, camera, colours, x, y } = this;
    const { scaleX, scaleY } = camera, { failed } = filters;
    const left = camera.width / 2 - camera.x * scaleX, top = camera.height / 2 - camera.y * scaleY;
    const pictures = [], plain = [], flagged = [];
    context.fillStyle = colours.faint;
    for (let i = this.count - 1; i >= 0; i--) {
      const at = x[i] * scaleX + left, down = y[i] * scaleY + top;
      if (at < -size || down < -size || at > camera.width + size || down > camera.height + size) continue;
      if (failed[i]) context.fillRect(at - 1, down - 1, 2, 2);
      else if (this.cells[i] >= 0 && this.atlas && this.crowd.level[i] <= level) pictures.push(i, at, down);
      else (this.flagged[i] ? flagged : plain).push(at, down);
    }
    for (const [dots, colour] of [[plain, colours.plain], [flagged, colours.flagged]]) {
      context.fillStyle = colour;
      for (let n = 0; n < dots.length; n += 2) context.fillRect(dots[n] - 1.5, dots[n + 1] - 1.5, 3, 3);
    }
    return { pictures, dots: [...plain, ...flagged] };
  }

  // A picture that covers dots lies on a pile. Pictures do not overlap: a cell of their size has one middle at most.
  drawPiles(pictures, dots, size) {
    const cell = (left, top) => Math.floor(left / size) * 1e5 + Math.floor(top / size);
    const middles = new Map(), piles = new Set(), half = size / 2;
    for (let n = 0; n < pictures.length; n += 3) middles.set(cell(pictures[n + 1], pictures[n + 2]), n);
    for (let d = 0; d < dots.length; d += 2) {
      for (const right of [-half, half]) {
        for (const down of [-half, half]) {
          const n = middles.get(cell(dots[d] + right, dots[d + 1] + down));
          if (n === undefined || piles.has(n)) continue;
          if (Math.abs(pictures[n + 1] - dots[d]) < half && Math.abs(pictures[n + 2] - dots[d + 1]) < half) piles.add(n);
        }
      }
    }
    this.context.lineWidth = 1;
    this.context.strokeStyle = this.colours.plain;
    for (const n of piles) {
      const left = Math.round(pictures[n + 1] - half), top = Math.round(pictures[n + 2] - half);
      this.context.strokeRect(left + 2.5, top + 2.5, size, size);
    }
  }

  drawPictures(pictures, size) {
    const { context, cellSize, columns, colours } = this, half = size / 2;
    context.imageSmoothingEnabled = size * this.ratio < cellSize * 1.5 || cellSize > 32;
    context.lineWidth = 1;
    for (let n = 0; n < pictures.length; n += 3) {
      const i = pictures[n], left = Math.round(pictures[n + 1] - half), top = Math.round(pictures[n + 2] - half);
      const chosen = excluded.has(i), cell = this.cells[i];
      context.fillStyle = colours.paper;
      context.fillRect(left, top, size, size);
      context.drawImage(this.atlas, (cell % columns) * cellSize, Math.floor(cell / columns) * cellSize, cellSize, cellSize, left, top, size, size);
      context.lineWidth = chosen ? 3 : 1;
      context.strokeStyle = chosen ? colours.marked : this.flagged[i] ? colours.flagged : colours.faint;
      context.strokeRect(left - 0.5, top - 0.5, size + 1, size + 1);
    }
  }

  // What is pointed at, above all others and with a frame; a dot becomes a picture.
  drawNear(size) {
    const i = this.near, [left, top] = this.camera.toView(this.x[i], this.y[i]);
    const pictured = this.atlas && this.cells[i] >= 0, half = pictured ? size / 2 + 2 : 5;
    if (pictured) this.drawPictures([i, left, top], size);
    this.context.strokeStyle = this.colours.marked;
    this.context.lineWidth = 2;
    this.context.strokeRect(left - half, top - half, 2 * half, 2 * half);
  }

  outline(area) {
    const { context, camera, colours } = this;
    context.beginPath();
    area.forEach(([x, y], n) => context[n ? "lineTo" : "moveTo"](...camera.toView(x, y)));
    context.closePath();
    context.fillStyle = context.strokeStyle = colours.marked;
    context.globalAlpha = 0.12;
    context.fill();
    context.globalAlpha = 1;
    context.lineWidth = 1.5;
    context.stroke();
  }

  // The corners of a frame around a sample, as it is shown.
  around(i) {
    const [left, top] = this.camera.toView(this.x[i], this.y[i]), half = this.size(this.camera.zoom) / 2 + 5;
    return [[-1, -1], [1, -1], [1, 1], [-1, 1]].map(([right, down]) => this.camera.toMap(left + right * half, top + down * half));
  }

  // The sample at a point of the view: the uppermost picture there, or else a dot no further than a finger.
  at(left, top) {
    for (let n = this.seen.length - 3; n >= 0; n -= 3) {
      const half = this.seenSize / 2;
      if (Math.abs(this.seen[n + 1] - left) <= half && Math.abs(this.seen[n + 2] - top) <= half) return this.seen[n];
    }
    let best = -1, least = 8;
    for (const i of this.fitting) {
      const [at, down] = this.camera.toView(this.x[i], this.y[i]);
      const apart = Math.max(Math.abs(at - left), Math.abs(down - top));
      if (apart < least) [best, least] = [i, apart];
    }
    return best;
  }

  // A 1 for each sample within the corners.
  within(corners) {
    const inside = new Uint8Array(this.count);
    for (let i = 0; i < this.count; i++) {
      let odd = false;
      for (let a = 0, b = corners.length - 1; a < corners.length; b = a++) {
        const [ax, ay] = corners[a], [bx, by] = corners[b];
        if (ay > this.y[i] !== by > this.y[i] && this.x[i] < ((bx - ax) * (this.y[i] - ay)) / (by - ay) + ax) odd = !odd;
      }
      inside[i] = odd ? 1 : 0;
    }
    return inside;
  }
}
