// The gallery. `Filters` says which label sets and scores are to be seen; a `Picture` is one photo with its masks;
// `Gallery` shows a page of pictures and counts; `Zoom` shows one picture large.
//
// A picture's `content` is the index of a label set, "all" of them together, or "none".

// Masks a photo that a label set opens with, on average: more than a handful cannot be told apart.
const MASKS_AT_FIRST = 8;

class Filters {
  constructor({ names, photos }) {
    this.shown = names.map(() => true);
    this.lowest = names.map((_, layer) => this.#firstLowest(photos, layer));
  }

  #firstLowest(photos, layer) {
    const scores = photos.flatMap((photo) => photo.layers[layer]?.scores ?? []).sort((a, b) => b - a);
    const most = MASKS_AT_FIRST * photos.length;
    return scores.length > most ? Math.ceil(100 * scores[most]) / 100 : 0;
  }

  passes(layer, score) {
    return score === null || score >= this.lowest[layer];
  }
}

class Picture {
  constructor({ names, colours, photos }, index, content) {
    this.photo = photos[index];
    this.content = content;
    this.title = content === "all" ? "All label sets" : content === "none" ? "Photo" : names[content];
    const layers = content === "all" ? [...names.keys()] : content === "none" ? [] : [content];
    this.groups = layers.map((layer) => this.#group(layer, names[layer], colours));
    const { width, height, source } = this.photo;
    this.node = shape(
      "svg",
      { class: "picture", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
      shape("image", { href: source, width, height }),
      ...this.groups.map((group) => group.node),
    );
    this.node.style.aspectRatio = `${width} / ${height}`;
    this.node.style.setProperty("--aspect", String(width / height));
  }

  // Masks come largest first, so that small ones lie on top and can be pointed at.
  #group(layer, name, colours) {
    const { paths, scores } = this.photo.layers[layer] ?? { paths: [], scores: null };
    const masks = paths.map((path, n) => {
      const score = scores === null ? null : scores[n];
      const told = score === null ? name : `${name}, score ${score.toFixed(2)}`;
      const node = shape("path", { class: "mask", d: path }, shape("title", {}, told));
      node.style.setProperty("--colour", this.content === "all" ? layerColour(layer) : colours[n % colours.length]);
      return { node, score };
    });
    return { layer, masks, node: shape("g", { class: "masks" }, ...masks.map((mask) => mask.node)) };
  }

  // Hides what the filters leave out; tells of each label set how many masks passed, of how many.
  apply(filters) {
    return this.groups.map(({ layer, masks, node }) => {
      node.toggleAttribute("hidden", !filters.shown[layer]);
      for (const mask of masks) mask.node.toggleAttribute("hidden", !filters.passes(layer, mask.score));
      return { layer, passed: masks.filter((mask) => filters.passes(layer, mask.score)).length, all: masks.length };
    });
  }

  countText(counts, filters) {
    if (this.content === "none") return "";
    if (this.photo.layers[this.content] === null) return "not in this label set";
    const visible = counts.filter(({ layer }) => filters.shown[layer]);
    return countOf(sum(visible, "passed"), sum(visible, "all"));
  }
}

function sum(records, key) {
  return records.reduce((total, record) => total + record[key], 0);
}

class Gallery {
  constructor(data, root) {
    this.data = data;
    this.root = root;
    this.filters = new Filters(data);
    this.zoom = new Zoom(data, this.filters);
    this.grid = document.getElementById("photos");
    this.page = 0;
    this.perPage = 8;
    this.together = false;
    this.barePhoto = false;
    this.panels = []; // of the photos on the page
    this.rows = data.names.map((name, layer) => this.#labelSetRow(name, layer));
    document.getElementById("label-sets").append(...this.rows.map((row) => row.node));
    root.querySelector(".label-sets").hidden = data.names.length === 0;
    this.pagers = [...root.querySelectorAll("[data-pager]")].map((node, index) => this.#pager(node, index));
    this.#listen();
    this.showPage();
  }

  get pageCount() {
    return Math.ceil(this.data.photos.length / this.perPage);
  }

  contents() {
    const layers = [...this.data.names.keys()];
    if (layers.length === 0) return ["none"];
    return [...(this.barePhoto ? ["none"] : []), ...(this.together ? ["all"] : layers)];
  }

  showPage() {
    const first = this.page * this.perPage;
    this.panels = [];
    const figures = this.data.photos.slice(first, first + this.perPage).map((photo, offset) => {
      const panels = this.contents().map((content) => this.#panel(first + offset, content));
      this.panels.push(...panels);
      const row = element("div", { class: "panels" }, ...panels.map((panel) => panel.node));
      return element("figure", { class: "photo" }, element("figcaption", {}, photo.name), row);
    });
    this.grid.replaceChildren(...figures);
    this.applyFilters();
  }

  #panel(index, content) {
    const picture = new Picture(this.data, index, content);
    const shown = element("span", { class: "shown" });
    const caption = element("span", { class: "caption" }, element("span", {}, picture.title), shown);
    const node = element("button", { type: "button", class: "panel" }, picture.node, caption);
    node.addEventListener("click", () => this.zoom.open(index, content));
    return { picture, shown, node };
  }

  applyFilters() {
    const counts = [];
    for (const { picture, shown, node } of this.panels) {
      node.hidden = this.filters.shown[picture.content] === false;
      const own = picture.apply(this.filters);
      shown.textContent = picture.countText(own, this.filters);
      node.setAttribute("aria-label", `Enlarge ${picture.photo.name}, ${picture.title}: ${shown.textContent}`);
      counts.push(...own);
    }
    const visible = this.contents().filter((content) => this.filters.shown[content] !== false);
    this.grid.style.setProperty("--panels", String(Math.max(1, visible.length)));
    this.#tell(counts);
  }

  #tell(counts) {
    this.rows.forEach((row, layer) => {
      const own = counts.filter((count) => count.layer === layer);
      row.shown.textContent = countOf(sum(own, "passed"), sum(own, "all"));
    });
    const visible = counts.filter(({ layer }) => this.filters.shown[layer]);
    const first = this.page * this.perPage;
    const last = Math.min(first + this.perPage, this.data.photos.length);
    const which = last - first === 1 ? `Photo ${last}` : `Photos ${first + 1} to ${last}`;
    const text = `${which} of ${this.data.photos.length} · ${countOf(sum(visible, "passed"), sum(visible, "all"))}`;
    for (const { status, previous, next } of this.pagers) {
      status.textContent = text;
      previous.setAttribute("aria-disabled", String(this.page === 0));
      next.setAttribute("aria-disabled", String(this.page === this.pageCount - 1));
    }
  }

  turn(by) {
    if (this.page + by < 0 || this.page + by >= this.pageCount) return false;
    this.page += by;
    this.showPage();
    return true;
  }

  #pager(node, index) {
    // One of the two announces itself; both would be heard twice.
    const status = element("p", { class: "status", role: index === 0 ? "status" : null });
    const previous = element("button", { type: "button" }, "← Previous");
    const next = element("button", { type: "button" }, "Next →");
    const turn = (by) => this.turn(by) && index > 0 && this.root.scrollIntoView({ block: "start" });
    previous.addEventListener("click", () => turn(-1));
    next.addEventListener("click", () => turn(1));
    node.append(status, previous, next);
    return { status, previous, next };
  }

  #labelSetRow(name, layer) {
    const box = element("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      this.filters.shown[layer] = box.checked;
      this.applyFilters();
    });
    const swatch = element("span", { class: "swatch" });
    swatch.style.setProperty("--colour", layerColour(layer));
    const label = element("label", {}, box, element("span", { class: "name" }, name), swatch);
    const shown = element("span", { class: "shown" });
    const scored = this.data.photos.some((photo) => photo.layers[layer]?.scores);
    const filter = scored ? this.#scoreSlider(name, layer) : [element("span", { class: "unscored" }, "has no scores")];
    return { node: element("div", { class: "label-set" }, label, ...filter, shown), shown };
  }

  #scoreSlider(name, layer) {
    const lowest = this.filters.lowest[layer];
    const value = element("output", {}, `≥ ${lowest.toFixed(2)}`);
    const label = `Lowest score shown of ${name}`;
    const slider = element("input", { type: "range", min: 0, max: 1, step: 0.01, value: lowest, "aria-label": label });
    slider.addEventListener("input", () => {
      this.filters.lowest[layer] = slider.valueAsNumber;
      value.textContent = `≥ ${slider.valueAsNumber.toFixed(2)}`;
      this.applyFilters();
    });
    return [slider, value];
  }

  #listen() {
    const onChange = (node, change) =>
      node.addEventListener("change", () => {
        change(node);
        this.showPage();
      });
    onChange(document.getElementById("bare-photo"), (box) => (this.barePhoto = box.checked));
    onChange(document.getElementById("per-page"), (select) => {
      const first = this.page * this.perPage;
      this.perPage = Number(select.value);
      this.page = Math.floor(first / this.perPage); // the first photo stays in sight
    });
    for (const radio of this.root.querySelectorAll("input[name=arrangement]")) {
      onChange(radio, () => (this.together = this.root.classList.toggle("together", radio.value === "together")));
    }
    const outlined = document.getElementById("outlined");
    outlined.addEventListener("change", () => this.root.classList.toggle("outlined", outlined.checked));
  }
}

class Zoom {
  constructor(data, filters) {
    this.data = data;
    this.filters = filters;
    this.index = 0;
    this.content = "all";
    const named = (name) => document.getElementById(`zoom-${name}`);
    this.parts = { picture: named("picture"), title: named("title"), count: named("count") };
    this.buttons = { previous: named("previous"), next: named("next") };
    this.dialog = document.getElementById("zoom");
    this.buttons.previous.addEventListener("click", () => this.turn(-1));
    this.buttons.next.addEventListener("click", () => this.turn(1));
    named("close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.turn(-1);
      if (event.key === "ArrowRight") this.turn(1);
    });
  }

  open(index, content) {
    Object.assign(this, { index, content });
    const picture = new Picture(this.data, index, content);
    const count = picture.countText(picture.apply(this.filters), this.filters);
    this.parts.picture.replaceChildren(picture.node);
    this.parts.title.textContent = picture.photo.name;
    this.parts.count.textContent = [picture.title, count].filter(Boolean).join(": ");
    this.buttons.previous.setAttribute("aria-disabled", String(index === 0));
    this.buttons.next.setAttribute("aria-disabled", String(index === this.data.photos.length - 1));
    if (!this.dialog.open) this.dialog.showModal();
  }

  turn(by) {
    const index = this.index + by;
    if (index >= 0 && index < this.data.photos.length) this.open(index, this.content);
  }
}
