// Groups of objects, a row each. An object is a button that shows the objects nearest to it below its row, and hides
// them again; one row at a time has them.

class Groups {
  constructor({ grouped, groups, objects }, root) {
    this.objects = objects;
    this.opened = null; // the row and the button whose nearest objects are shown
    this.rows = groups.map((group, index) => this.#row(group, index, grouped));
    root.append(...this.rows.map((row) => row.node));
  }

  #row({ size, shown }, index, grouped) {
    const title = element("h3", { id: `group-${index}` }, `Group ${index + 1}`);
    const share = `${size.toLocaleString("en")} ${size === 1 ? "object" : "objects"}, ${percent(size / grouped)}`;
    const row = { nearest: element("div", { class: "nearest", role: "status", hidden: true }) };
    const pictures = shown.map((place, rank) => element("li", {}, this.#button(row, place, index, rank)));
    const missing = pictures.length === 0 ? [element("p", { class: "empty" }, "No photo of these could be read.")] : [];
    const list = element("ul", { class: "objects", "aria-labelledby": title.id }, ...pictures);
    const bar = element("div", { class: "share", "aria-hidden": "true" }, element("span"));
    bar.firstChild.style.width = `${(100 * size) / grouped}%`;
    const head = element("div", { class: "group-head" }, title, element("p", {}, share), bar);
    row.node = element("li", { class: "group" }, head, ...(missing.length ? missing : [list]), row.nearest);
    return row;
  }

  #button(row, place, index, rank) {
    const told = `Object ${rank + 1} of group ${index + 1}, ${this.#described(place)}`;
    const picture = this.#picture(place, told);
    if (this.objects[place].nearest.length === 0) return picture;
    const button = element("button", { type: "button", "aria-expanded": "false", title: told }, picture);
    button.addEventListener("click", () => this.#toggle(row, place, button));
    return button;
  }

  #toggle(row, place, button) {
    const closing = this.opened?.button === button;
    if (this.opened !== null) {
      this.opened.button.setAttribute("aria-expanded", "false");
      this.opened.row.nearest.hidden = true;
      this.opened = null;
    }
    if (closing) return;
    this.opened = { row, button };
    button.setAttribute("aria-expanded", "true");
    row.nearest.replaceChildren(
      element("p", {}, "Nearest to ", element("strong", {}, this.objects[place].name), ", and how alike they are:"),
      element("ul", { class: "objects" }, ...this.objects[place].nearest.map((each) => this.#neighbour(each))),
    );
    row.nearest.hidden = false;
  }

  #neighbour([place, likeness]) {
    const told = `${likeness} percent alike, ${this.#described(place)}`;
    const caption = element("figcaption", { "aria-hidden": "true" }, `${likeness}%`);
    return element("li", {}, element("figure", { title: told }, this.#picture(place, told), caption));
  }

  #picture(place, alt) {
    const { width, height, source } = this.objects[place];
    return element("img", { src: source, width, height, alt });
  }

  #described(place) {
    return `from ${this.objects[place].name}, score ${this.objects[place].score.toFixed(2)}`;
  }
}

function percent(share) {
  return share > 0 && share < 0.01 ? "under 1%" : `${Math.round(100 * share)}%`;
}
