// The packing explorer. Where everything lies was computed by refinfer.packing.xnnpack; here it is looked up and drawn.
"use strict";

(() => {
  const { html, svg, picture, choice, expand, arrows, points, whenWide } = self.refinferExplore;
  const data = self.refinferData.packing;
  const root = document.getElementById("packing-explorer");
  if (!root) return;

  const state = { N: 8, K: 8, nr: 4, kr: "1", sr: 1, bias: true };
  let layout; // what is drawn: see `build`
  let chosen = 0; // the index in the packed matrix that is pointed at

  // --- The controls ---

  const presets = choice(
    "packing-preset",
    "Start from",
    [...data.presets.map((preset, i) => ({ value: i, text: preset.name })), { value: "", text: "a choice of your own" }],
    (value) => value !== "" && start(data.presets[value]),
  );
  presets.box.classList.add("explore-wide");
  const abouts = {
    N: "N, rows",
    K: "K, columns",
    nr: "nr, rows of a tile",
    kr: "kr, columns kept together",
    sr: "sr, shuffled groups",
  };
  const fields = {};
  for (const [name, about] of Object.entries(abouts)) {
    const options = data.choices[name].map((n) => ({ value: n, text: n === "K" ? "K: whole rows" : `${n}` }));
    fields[name] = choice(`packing-${name}`, about, options, (value) => {
      state[name] = name === "kr" ? value : Number(value);
      ownChoice();
    });
  }
  const bias = html("input", {
    type: "checkbox",
    id: "packing-bias",
    onchange: () => {
      state.bias = bias.checked;
      ownChoice();
    },
  });
  const note = html("p", { class: "explore-note", id: "packing-note" });
  const summary = html("p", { id: "packing-summary", "aria-live": "polite" });
  const words = html("p", { id: "packing-words", class: "explore-words sticky", "aria-live": "polite" });

  const left = html("div", {
    class: "explore-picture",
    id: "packing-matrix",
    tabindex: 0,
    role: "application",
    "aria-label": "The matrix as stored, row after row. Arrow keys move.",
    "aria-describedby": "packing-words",
  });
  const right = html("div", {
    class: "explore-picture",
    id: "packing-tiles",
    tabindex: 0,
    role: "application",
    "aria-label": "The packed tiles, in memory order. Arrow keys move.",
    "aria-describedby": "packing-words",
  });
  const before = html("button", { type: "button", id: "packing-before", onclick: () => step(-1) }, "← step before");
  const next = html("button", { type: "button", id: "packing-next", onclick: () => step(1) }, "next step →");

  const key = (name, text) =>
    html("span", { class: "explore-key" }, html("i", { class: `key-${name}`, "aria-hidden": "true" }), text);

  root.append(
    html("div", { class: "explore-controls" }, presets.box, ...Object.values(fields).map((field) => field.box)),
    html("div", { class: "explore-row" }, html("label", { class: "explore-check" }, bias, " biases in front of each tile")),
    note,
    html(
      "div",
      { class: "explore-legend" },
      key("even", "tiles 0, 2, 4 …"),
      key("odd", "tiles 1, 3, 5 …"),
      key("bias", "bias"),
      key("pad", "0: a pad behind K"),
      key("missing", "lane of a missing row"),
      key("chosen", "pointed at"),
      key("step", "read in the same step"),
    ),
    words,
    html(
      "div",
      { class: "explore-two" },
      html("section", {}, html("h2", {}, "The matrix, row after row"), left),
      html(
        "section",
        {},
        html("h2", {}, "The packed tiles, in memory order"),
        right,
        html("div", { class: "explore-row" }, html("span", {}, "Walk as the kernel does:"), before, next),
      ),
    ),
    summary,
  );

  // --- What lies where ---

  const keyOf = (s) => `${s.K} ${s.nr} ${s.kr} ${s.sr} ${s.bias ? 1 : 0}`;

  /** Look a layout up: what lies at each index of the packed matrix, and where each weight of the matrix does. */
  function build() {
    const entry = data.layouts[keyOf(state)];
    const tiles = data.tiles[`${state.N} ${state.nr}`];
    const starts = expand(entry.starts);
    const turns = expand(entry.turns);
    const patterns = entry.patterns.map(expand);
    const cells = new Array(tiles * entry.tile);
    const where = [];
    expand(entry.biases).forEach((p, n) => {
      if (p < cells.length) cells[p] = { kind: n < state.N ? "bias" : "missing", isBias: true, n, k: null };
    });
    for (let n = 0; n < tiles * state.nr; n++) {
      where.push([]);
      patterns[turns[n]].forEach((offset, k) => {
        const p = starts[n] + offset;
        cells[p] = { kind: n >= state.N ? "missing" : k < state.K ? "weight" : "pad", isBias: false, n, k };
        where[n].push(p);
      });
    }
    const first = state.bias ? state.nr : 0; // of a tile's weights
    const whole = entry.step === entry.tile - first; // one step to a tile: its rows are whole, one after the other
    const stride = whole ? entry.group : entry.step;
    cells.forEach((cell, p) => {
      cell.p = p;
      cell.tile = Math.floor(p / entry.tile);
      const within = p - cell.tile * entry.tile;
      cell.step = within < first ? -1 : Math.floor((within - first) / stride);
      cell.begins = cell.tile * entry.tile + (cell.step < 0 ? 0 : first + cell.step * stride);
      cell.lane = cell.n - cell.tile * state.nr;
    });
    layout = { entry, tiles, cells, where, first, whole, stride };
  }

  // --- Drawing ---

  const SMALLEST = 9;
  let marks = []; // of each index: the elements that show it, on both sides

  const name = (n, k) => (Math.max(state.N, state.K) > 10 ? `${n},${k}` : `${n}${k}`);
  const room = (text) => text.length * 7.3 + 3; // in letters of 12 pixels
  const longest = () => room(name(state.N - 1, state.K - 1));
  const shade = (cell) => 0.22 + (0.55 * cell.lane) / Math.max(1, state.nr - 1);

  function label(cell) {
    if (cell.kind === "missing") return "";
    return cell.kind === "pad" ? "0" : cell.isBias ? `b${cell.n}` : name(cell.n, cell.k);
  }

  function drawCell(cell, x, y, size, attribute) {
    const box = svg("rect", { x: x + 0.5, y: y + 0.5, width: size - 1, height: size - 1, rx: size > 16 ? 3 : 1 });
    if (cell.kind === "weight") box.style.fillOpacity = shade(cell).toFixed(3);
    const group = svg("g", { class: `cell ${cell.kind} ${cell.tile % 2 ? "odd" : "even"}`, [attribute]: cell.p }, box);
    if (size >= longest()) {
      group.append(svg("text", { x: x + size / 2, y: y + size / 2 + 4, "text-anchor": "middle" }, label(cell)));
    }
    (marks[cell.p] ??= []).push(group);
    return group;
  }

  /** The side of a cell for so many across and so many cells in all. */
  function sizeOf(width, across, cells) {
    const wanted = cells > 700 ? 11 : cells > 330 ? 14 : cells > 170 ? 20 : Math.max(28, Math.ceil(longest()));
    return Math.max(SMALLEST, Math.min(wanted, Math.floor(width / across)));
  }

  function drawMatrix() {
    const edge = 24;
    const gap = 5;
    const width = left.clientWidth - 4;
    const size = sizeOf(width - edge - 46, state.K, state.N * state.K);
    const every = size >= 16 ? 1 : 8;
    const nodes = [];
    for (let k = 0; k < state.K; k += every) {
      nodes.push(svg("text", { class: "axis", x: edge + (k + 0.5) * size, y: 14, "text-anchor": "middle" }, `${k}`));
    }
    const y = (n) => 20 + n * size + Math.floor(n / state.nr) * gap;
    for (let n = 0; n < state.N; n++) {
      const middle = y(n) + size / 2 + 4;
      if (n % every === 0) {
        nodes.push(svg("text", { class: "axis", x: edge - 6, y: middle, "text-anchor": "end" }, `${n}`));
      }
      for (let k = 0; k < state.K; k++) {
        nodes.push(drawCell(layout.cells[layout.where[n][k]], edge + k * size, y(n), size, "data-p"));
      }
      if (n % state.nr === 0 && (n + 1 < state.N || n === 0 || size >= 16)) {
        const text = svg("text", { class: "axis", x: edge + state.K * size + 6, y: Math.max(middle, y(n) + 11) });
        text.append(`tile ${n / state.nr}`);
        nodes.push(text);
      }
    }
    const about = `A matrix of ${state.N} rows and ${state.K} columns`;
    left.replaceChildren(picture(edge + state.K * size + 54, y(state.N - 1) + size + 4, about, ...nodes));
    left.firstChild.classList.toggle("small", size < 16);
  }

  /** How a tile is broken into lines: a line ends with a step, and before, where the width ends, between lanes. */
  function linesOf(tile, across) {
    const lines = [];
    const end = (tile + 1) * layout.entry.tile;
    let p = tile * layout.entry.tile;
    while (p < end) {
      const isBias = layout.cells[p].step < 0;
      const last = layout.cells[p].begins + (isBias ? layout.first : layout.stride);
      for (; p < last; p += across) lines.push([p, Math.min(p + across, last)]);
      p = last;
    }
    return lines;
  }

  let packedLines = []; // for the arrow keys: where each line begins and ends

  function drawTiles() {
    const width = right.clientWidth - 4;
    const edge = 44;
    const { group } = layout.entry;
    const wanted = sizeOf(width, 1, layout.cells.length);
    const fit = Math.max(1, Math.floor((width - edge) / wanted / group)); // lanes to a line
    let lanes = layout.stride / group;
    while (lanes > fit) lanes /= 2;
    const across = lanes * group;
    const size = sizeOf(width - edge, across, layout.cells.length);
    const block = edge + across * size + 14;
    const columns = Math.max(1, Math.min(layout.tiles, Math.floor((width + 14) / block)));
    const nodes = [];
    packedLines = [];
    let top = 0;
    for (let tile = 0; tile < layout.tiles; tile += columns) {
      let bottom = top;
      for (let t = tile; t < Math.min(tile + columns, layout.tiles); t++) {
        const x0 = (t - tile) * block + edge;
        const title = svg("text", { class: "axis strong", x: x0, y: top + 13 }, `tile ${t}`);
        nodes.push(title);
        let y = top + 20;
        let labelled = -99;
        for (const [from, to] of linesOf(t, across)) {
          packedLines.push([from, to]);
          const cell = layout.cells[from];
          if (cell.begins === from && cell.step === 0 && layout.first) y += 3;
          else if (cell.begins === from && cell.step > 0 && layout.stride > across) y += 3;
          if (y - labelled >= 15) {
            nodes.push(svg("text", { class: "axis", x: x0 - 6, y: y + size / 2 + 4, "text-anchor": "end" }, `@${from}`));
            labelled = y;
          }
          for (let p = from; p < to; p++) nodes.push(drawCell(layout.cells[p], x0 + (p - from) * size, y, size, "data-p"));
          y += size;
        }
        bottom = Math.max(bottom, y);
      }
      top = bottom + 12;
    }
    const about = `${layout.tiles} packed tiles of ${state.nr} rows`;
    right.replaceChildren(picture(Math.min(width, columns * block), top, about, ...nodes));
    right.firstChild.classList.toggle("small", size < 16);
  }

  function draw() {
    if (!left.clientWidth) return;
    marks = [];
    drawMatrix();
    drawTiles();
    mark();
  }

  let marked = [];

  /** Show what is pointed at on both sides, and what the kernel reads with it. */
  function mark() {
    for (const node of marked) node.classList.remove("chosen", "step");
    marked = [];
    const { begins, step } = layout.cells[chosen];
    const length = step < 0 ? layout.first : layout.stride;
    for (let p = begins; p < begins + length; p++) {
      for (const node of marks[p] ?? []) {
        node.classList.add(p === chosen ? "chosen" : "step");
        marked.push(node);
      }
    }
    words.textContent = say(layout.cells[chosen]);
  }

  function say(cell) {
    const at = `index ${cell.p} of the packed matrix`;
    const step = cell.step < 0 || layout.whole ? "" : ` step ${cell.step},`;
    const place = `tile ${cell.tile},${step} lane ${cell.lane}`;
    if (cell.kind === "weight") {
      const flat = cell.n * state.K + cell.k;
      return `The weight of row ${cell.n} and column ${cell.k}, number ${flat} of the matrix as stored, lies at ${at}: ${place}.`;
    }
    if (cell.kind === "bias") return `The bias of row ${cell.n} lies at ${at}: ${place}, in front of the tile's weights.`;
    if (cell.kind === "pad") {
      return `A zero lies at ${at}: ${place}. It pads row ${cell.n} from ${state.K} to ${layout.entry.paddedK} columns.`;
    }
    const what = cell.isBias ? "bias" : "weight";
    return `There is no ${what} at ${at}: ${place}. The matrix has no row ${cell.n}; nobody reads what lies there.`;
  }

  // --- Moving about ---

  function choose(p) {
    chosen = p;
    mark();
  }

  arrows(left, (dx, dy) => {
    const cell = layout.cells[chosen];
    const clamp = (value, most) => Math.max(0, Math.min(most, value));
    const n = clamp((cell.n ?? 0) + dy, state.N - 1);
    const k = clamp((cell.k ?? 0) + dx, state.K - 1);
    choose(layout.where[n][k]);
  });
  arrows(right, (dx, dy) => {
    const clamp = (value, most) => Math.max(0, Math.min(most, value));
    if (dx) {
      choose(clamp(chosen + dx, layout.cells.length - 1));
      return;
    }
    const line = packedLines.findIndex(([from, to]) => from <= chosen && chosen < to);
    const [from, to] = packedLines[clamp(line + dy, packedLines.length - 1)];
    choose(Math.min(from + chosen - packedLines[line][0], to - 1));
  });
  const over = (cell) => choose(Number(cell.getAttribute("data-p")));
  points(left, "data-p", over);
  points(right, "data-p", over);

  /** Go to the first weight of the next step of the kernel, or of the one before. */
  function step(by) {
    let p = layout.cells[chosen].begins;
    if (by > 0) {
      p += layout.cells[chosen].step < 0 ? layout.first : layout.stride;
      if (p >= layout.cells.length) p = 0;
    } else {
      p = layout.cells[(p || layout.cells.length) - 1].begins;
    }
    choose(p);
  }

  // --- Changes ---

  function ownChoice() {
    presets.select.value = "";
    note.textContent = "";
    show();
  }

  function start(preset) {
    Object.assign(state, { ...preset, kr: `${preset.kr}`, bias: preset.has_bias });
    show();
    note.textContent = preset.note;
  }

  /** Show the state: a combination that is not offered becomes the nearest that is. */
  function show() {
    while (!data.layouts[keyOf(state)]) state.sr = state.sr === 1 ? 2 : state.sr / 2;
    for (const name of Object.keys(fields)) fields[name].select.value = `${state[name]}`;
    for (const option of fields.sr.select.options) {
      option.disabled = !data.layouts[keyOf({ ...state, sr: Number(option.value) })];
    }
    bias.checked = state.bias;
    build();
    chosen = layout.where[Math.min(1, state.N - 1)][Math.min(2, state.K - 1)];
    const count = (kind) => layout.cells.filter((cell) => cell.kind === kind).length;
    const all = layout.cells.length;
    const padding = count("pad") + count("missing");
    const pads = [
      [count("pad"), count("pad") === 1 ? "zero behind K" : "zeros behind K"],
      [count("missing"), count("missing") === 1 ? "place of a missing row" : "places of missing rows"],
    ].filter(([n]) => n);
    summary.textContent =
      `The matrix has ${count("weight")} weights${state.bias ? ` and ${count("bias")} biases` : ""}. Packed it takes ` +
      `${all} elements, ${layout.tiles} ${layout.tiles === 1 ? "tile" : "tiles"} of ${layout.entry.tile}: ` +
      (padding
        ? `${pads.map(([n, what]) => `${n} ${what}`).join(" and ")}, ${Math.round((100 * padding) / all)} % of all.`
        : "nothing is padding.");
    draw();
  }

  start(data.presets[0]);
  presets.select.value = "0";
  whenWide(root, draw);
})();
