// The schedule explorer. Plans, spans and figures were computed by refinfer.offload; here they are looked up and drawn.
"use strict";

(() => {
  const { html, svg, picture, load, choice, place, bytes, arrows, points, whenWide } = self.refinferExplore;
  const index = self.refinferData.schedule;
  const root = document.getElementById("schedule-explorer");
  if (!root) return;

  const state = { model: "llama2-7b", device: "nvme", arm: "leading", budget: 4 };
  let data; // of the model that is shown

  // --- The controls ---

  const field = (name, about, options) =>
    choice(`schedule-${name}`, about, options, (value) => {
      state[name] = value;
      show();
    });
  const fields = {
    model: field(
      "model",
      "model and format",
      index.models.map((m) => ({ value: m.name, text: `${m.name} in ${m.format}, ${bytes(m.bytes)}` })),
    ),
    device: field("device", "disk", index.devices.map((d) => ({ value: d.name, text: d.name }))),
    arm: field("arm", "plan", index.arms.map((a) => ({ value: a.name, text: a.name }))),
  };
  const slider = html("input", {
    type: "range",
    id: "schedule-budget",
    min: 0,
    max: index.shares.length - 1,
    step: 1,
    oninput: () => {
      state.budget = Number(slider.value);
      show();
    },
  });
  const budgetLabel = html("label", { for: "schedule-budget" }, "memory budget");
  const ends = html("div", { class: "explore-ends", "aria-hidden": "true" }, html("span", {}, "10 %"), html("span", {}, "everything"));
  const sliderBox = html("div", { class: "explore-field explore-wide" }, budgetLabel, slider, ends);
  const note = html("p", { class: "explore-note", id: "schedule-note" });
  const headline = html("div", { class: "explore-headline", "aria-hidden": "true" });
  const words = html("p", { id: "schedule-words", class: "explore-words", "aria-live": "polite" });

  const spot = (id, attributes = {}) => html("div", { class: "explore-picture", id, ...attributes });
  const token = spot("schedule-token");
  const closeUp = spot("schedule-close-up");
  const closeWords = html("p", { id: "schedule-close-words", class: "explore-note" });
  const account = spot("schedule-account");
  const grid = spot("schedule-grid", {
    tabindex: 0,
    role: "application",
    "aria-label": "What is locked of each matrix in each layer. Arrow keys move.",
    "aria-describedby": "schedule-cell",
  });
  const kindWords = html("p", { id: "schedule-kinds", class: "explore-note" });
  const cellWords = html("p", { id: "schedule-cell", "aria-live": "polite" });
  const all = html("div", { id: "schedule-all", class: "explore-bars" });
  const sweep = spot("schedule-sweep");
  const command = html("code", { id: "schedule-command" });
  const commandNote = html("p", { class: "explore-note" });

  const key = (name, text) =>
    html("span", { class: "explore-key" }, html("i", { class: `key-${name}`, "aria-hidden": "true" }), text);
  const section = (title, ...children) => html("section", {}, html("h2", {}, title), ...children);

  root.append(
    html(
      "div",
      { class: "explore-controls explore-three" },
      ...Object.values(fields).map((f) => f.box),
      sliderBox,
    ),
    note,
    headline,
    words,
    section(
      "One token, from its first chunk to its last",
      html(
        "div",
        { class: "explore-legend" },
        key("reads", "reading"),
        key("computes", "computing"),
        key("waits", "waiting for the disk"),
        html("span", {}, "each column is a hundredth of the token"),
      ),
      token,
    ),
    section("A close-up of 24 chunks", closeUp, closeWords),
    html(
      "div",
      { class: "explore-halves" },
      section("Where every byte of the budget goes", account),
      section("What is locked, layer by layer", grid, cellWords, kindWords),
      section("Every plan within this budget, tokens per second", all),
      section("This plan within every budget, tokens per second", sweep),
    ),
    section("The same on your machine", html("pre", {}, command), commandNote),
  );

  // --- Looking up ---

  const run = (arm = state.arm, budget = state.budget) => {
    const [rate, ideal, waiting, accountNumber, gridNumber, pictureNumber] = data.runs[state.device][arm][budget];
    const [locked, ring, pageCache, unused, read, ringChunks] = data.accounts[accountNumber];
    return {
      rate,
      ideal,
      waiting,
      account: { locked, ring, pageCache, unused, read, ringChunks },
      grid: data.grids[gridNumber],
      picture: data.pictures[pictureNumber].split("|"),
    };
  };

  const isPlan = () => index.plans.includes(state.arm);
  const three = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(3));
  const percent = (share) => `${Math.round(100 * share)} %`;
  const share = (number) => (index.shares[number] === null ? "everything fits" : `${percent(index.shares[number])} of the weights`);

  function time(ms) {
    if (ms >= 1000) return `${three(ms / 1000)} s`;
    return ms >= 0.1 ? `${three(ms)} ms` : `${three(1000 * ms)} µs`;
  }

  // --- Drawing ---

  const edge = () => (root.clientWidth < 500 ? 62 : 84);
  const LANE = 46;

  function lane(name, y, height) {
    return svg("text", { class: "axis", x: edge() - 8, y: y + height / 2 + 4, "text-anchor": "end" }, name);
  }

  const rect = (kind, x, y, width, height, ...children) =>
    svg("rect", { class: kind, x, y, width: Math.max(width, 0), height: Math.max(height, 0) }, ...children);
  const titled = (text) => svg("title", {}, text);

  function ruler(nodes, left, width, y, ms, from = 0) {
    for (const [at, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
      const x = left + at * width;
      nodes.push(svg("line", { class: "rule", x1: x, x2: x, y1: y, y2: y + 4 }));
      const text = from + at * ms === 0 ? "0" : time(from + at * ms);
      nodes.push(svg("text", { class: "axis", x, y: y + 17, "text-anchor": anchor }, text));
    }
  }

  function drawToken({ picture: [strip], rate, waiting }) {
    const left = edge();
    const width = token.clientWidth - left - 4;
    const step = width / index.columns;
    const nodes = [lane("disk", 2, LANE), lane("compute", LANE + 10, LANE)];
    nodes.push(rect("empty", left, 2, width, LANE), rect("waits", left, LANE + 10, width, LANE));
    for (let i = 0; i < index.columns; i++) {
      const reading = place(strip[2 * i]);
      const computing = place(strip[2 * i + 1]);
      const x = left + i * step;
      const wide = step + 0.4; // no hairlines between columns
      if (reading) nodes.push(rect("reads column", x, 2 + LANE * (1 - reading), wide, LANE * reading));
      if (computing) nodes.push(rect("computes column", x, LANE + 10 + LANE * (1 - computing), wide, LANE * computing));
    }
    ruler(nodes, left, width, 2 * LANE + 14, 1000 / rate);
    const about = `One token: the disk above, the computation below, which waits ${percent(waiting)} of the time`;
    token.replaceChildren(picture(left + width + 4, 2 * LANE + 36, about, ...nodes));
  }

  const SHORT = { q_proj: "q", k_proj: "k", v_proj: "v", o_proj: "o", gate_proj: "gate", up_proj: "up", down_proj: "down", lm_head: "out" };

  function drawCloseUp({ picture: [, about, units, others], rate }) {
    const [first, firstLayer, lastLayer, before, ms, waited] = about.split(",").map(Number);
    const left = edge();
    const width = closeUp.clientWidth - left - 4;
    const disk = 2;
    const compute = LANE + 40;
    const height = LANE - 10;
    const x = (digits) => left + width * place(digits);
    const nodes = [lane("disk", disk, height), lane("compute", compute, height)];
    nodes.push(rect("empty", left, disk, width, height), rect(waited ? "waits" : "empty", left, compute, width, height));
    const links = [];
    let streamed = 0;
    const chunks = [];
    for (let i = 0; i < units.length; i += 10) {
      const [kind, flag] = units.slice(i, i + 2);
      chunks.push({ name: data.kinds[Number(kind)].name, streams: flag === "s", at: [2, 4, 6, 8].map((j) => units.slice(i + j, i + j + 2)) });
    }
    for (let i = 0; i < others.length; i += 4) {
      const from = x(others.slice(i, i + 2));
      nodes.push(rect("reads other edged", from, disk, x(others.slice(i + 2, i + 4)) - from, height, titled("the read of a chunk outside this picture")));
    }
    chunks.forEach(({ name, streams, at: [from, to, readFrom, readTo] }, i) => {
      const what = `chunk ${first + i}, ${name}`;
      const box = (className, a, b, y, text) => {
        nodes.push(rect(className, a, y, b - a, height, titled(text)));
        if (b - a > 8 * SHORT[name].length + 4) {
          nodes.push(svg("text", { class: "on", x: (a + b) / 2, y: y + height / 2 + 4, "text-anchor": "middle" }, SHORT[name]));
        }
      };
      if (!streams) nodes.push(rect("paper", x(from), compute, x(to) - x(from), height));
      box(`computes edged${streams ? "" : " kept"}`, x(from), x(to), compute, `${what}: ${streams ? "was read" : "locked"}`);
      if (!streams) return;
      streamed++;
      if (readFrom === "..") return;
      box("reads edged", x(readFrom), x(readTo), disk, `the read of ${what}`);
      links.push(svg("path", { class: "link", d: `M${x(readTo)} ${disk + height} L${x(from)} ${compute}` }));
    });
    nodes.push(...links);
    ruler(nodes, left, width, compute + height + 4, ms, before);
    const label = `Chunks ${first} to ${first + chunks.length - 1}: reads above, products below`;
    closeUp.replaceChildren(picture(left + width + 4, compute + height + 26, label, ...nodes));
    const layers = firstLayer === lastLayer ? layerName(firstLayer) : `${layerName(firstLayer)} to ${layerName(lastLayer)}`;
    closeWords.textContent =
      `Chunks ${first} to ${first + chunks.length - 1} of ${data.chunks}, ${layers}: ` +
      `${chunks.length - streamed} of these ${chunks.length} are in memory already (faint), ${streamed} are read. ` +
      `It takes ${time(ms)}, of it ${waited < ms / 1000 ? "nothing" : time(waited)} waiting.` +
      (streamed ? " A line leads from the end of a read to the product that needs it." : "");
  }

  const layerName = (layer) => (layer < data.layers ? `layer ${layer}` : "the output table");

  const PARTS = [
    ["locked", "locks", "locked chunks"],
    ["pageCache", "cached", "page cache"],
    ["ring", "reads", "ring"],
    ["kvCache", "kv", "KV cache"],
    ["scratch", "scratch", "scratch"],
    ["threads", "scratch", "prefetch threads"],
    ["resident", "resident", "norms and biases"],
    ["unused", "empty", "unused"],
  ];

  function drawAccount({ account: spent }) {
    const budget = data.budgets[state.budget];
    const parts = { ...data.fixed, ...spent };
    const width = account.clientWidth - 4;
    const nodes = [rect("empty", 0, 2, width, 30)];
    let x = 0;
    const list = html("dl", { class: "explore-account" });
    for (const [name, className, text] of PARTS) {
      if (!parts[name] && name !== "unused" && name !== "locked") continue;
      if (name === "locked" && state.arm === "mmap") continue;
      const wide = (width * parts[name]) / budget;
      if (name !== "unused") nodes.push(rect(className, x, 2, Math.max(wide, parts[name] ? 1 : 0), 30, titled(`${text}: ${bytes(parts[name])}`)));
      x += wide;
      list.append(
        html("dt", {}, key(className, name === "ring" ? `ring of ${spent.ringChunks} chunks` : text)),
        html("dd", {}, bytes(parts[name])),
        html("dd", {}, `${((100 * parts[name]) / budget).toFixed(1)} %`),
      );
    }
    account.replaceChildren(picture(width, 34, `The budget of ${bytes(budget)}, divided`, ...nodes), list);
  }

  let cell = { kind: 0, layer: 0 };

  /** The grid's rows: of each kind the percentage locked, and the share locked of each layer's matrix. */
  const lockRows = (text) =>
    text
      ? text.split(" ").map((row) => {
          const [locked, digits] = row.split(":");
          return { locked, shares: digits.match(/../g).map(place) };
        })
      : data.kinds.map(({ name }) => ({ locked: "0", shares: new Array(name === "lm_head" ? 1 : data.layers).fill(0) }));

  function drawGrid({ grid: text }) {
    const rows = lockRows(text);
    const left = 76;
    const right = 46;
    const width = grid.clientWidth - left - right;
    const step = width / (data.layers + 2);
    const high = 19;
    const nodes = [];
    rows.forEach(({ locked, shares }, kind) => {
      const y = 2 + kind * (high + 3);
      nodes.push(svg("text", { class: "axis", x: left - 6, y: y + 14, "text-anchor": "end" }, data.kinds[kind].name));
      nodes.push(svg("text", { class: "axis", x: left + width + right - 2, y: y + 14, "text-anchor": "end" }, `${locked} %`));
      shares.forEach((part, i) => {
        const isTable = data.kinds[kind].name === "lm_head";
        const x = isTable ? left : left + i * step;
        const wide = isTable ? step * data.layers : step;
        const gap = step > 6 ? 1.5 : 0.5;
        nodes.push(
          svg(
            "g",
            { class: `lock${cell.kind === kind && cell.layer === i ? " chosen" : ""}`, "data-kind": kind, "data-layer": i },
            rect("streams", x, y, wide - gap, high),
            isTable ? rect("locks", x, y, (wide - gap) * part, high) : rect("locks", x, y + high * (1 - part), wide - gap, high * part),
            rect("frame", x, y, wide - gap, high),
          ),
        );
      });
    });
    const bottom = 2 + rows.length * (high + 3);
    const every = data.layers > 40 ? 20 : 10;
    for (let layer = 0; layer < data.layers; layer += every) {
      nodes.push(svg("text", { class: "axis", x: left + (layer + 0.5) * step, y: bottom + 12, "text-anchor": "middle" }, `${layer}`));
    }
    nodes.push(svg("text", { class: "axis", x: left - 6, y: bottom + 12, "text-anchor": "end" }, "layer"));
    grid.replaceChildren(picture(left + width + right, bottom + 18, "Green is locked, pale blue is read for each token", ...nodes));
    kindWords.textContent =
      state.arm === "mmap"
        ? "Nothing is locked: what the page cache holds is never what is needed next."
        : `Locked of each kind: ${rows.map(({ locked }, kind) => `${data.kinds[kind].name} ${locked} %`).join(", ")}.`;
    sayCell(rows);
  }

  function sayCell(rows) {
    const { name, bytes: size } = data.kinds[cell.kind];
    const where = name === "lm_head" ? "The output table" : `Layer ${cell.layer}, ${name}`;
    cellWords.textContent = `${where}: ${(100 * rows[cell.kind].shares[cell.layer]).toFixed(0)} % of ${bytes(size)} locked.`;
  }

  function chooseCell(kind, layer) {
    cell = { kind, layer };
    for (const node of grid.querySelectorAll(".lock")) {
      node.classList.toggle("chosen", Number(node.dataset.kind) === kind && Number(node.dataset.layer) === layer);
    }
    sayCell(lockRows(run().grid));
  }

  arrows(grid, (dx, dy) => {
    const clamp = (value, most) => Math.max(0, Math.min(most, value));
    const kind = clamp(cell.kind + dy, data.kinds.length - 1);
    const most = data.kinds[kind].name === "lm_head" ? 0 : data.layers - 1;
    chooseCell(kind, clamp(cell.layer + dx, most));
  });
  points(grid, "data-kind", (node) => chooseCell(Number(node.dataset.kind), Number(node.dataset.layer)));

  const rows = index.arms.map(({ name }) => {
    const bar = html("span", { class: "arm-bar" });
    const rate = html("span", { class: "arm-rate" });
    const choose = () => {
      state.arm = name;
      show();
    };
    const button = html(
      "button",
      { type: "button", "data-arm": name, onclick: choose },
      html("span", { class: "arm-name" }, name),
      html("span", { class: "arm-track" }, bar),
      rate,
    );
    return { name, bar, rate, button };
  });
  all.append(...rows.map(({ button }) => button));

  function drawAll() {
    const runs = index.arms.map(({ name }) => run(name));
    const most = Math.max(...runs.map(({ rate }) => rate));
    rows.forEach(({ name, bar, rate, button }, i) => {
      button.setAttribute("aria-pressed", `${name === state.arm}`);
      bar.style.width = `${((100 * runs[i].rate) / most).toFixed(2)}%`;
      rate.textContent = three(runs[i].rate);
    });
  }

  function drawSweep() {
    const left = 56;
    const width = sweep.clientWidth - left - 12;
    const height = 190;
    const rates = Object.fromEntries(index.arms.map(({ name }) => [name, data.budgets.map((_, b) => run(name, b))]));
    const most = Math.max(...Object.values(rates).flat().map(({ rate }) => rate)) * 1.06;
    const x = (b) => left + (width * (data.budgets[b] - data.budgets[0])) / (data.budgets.at(-1) - data.budgets[0]);
    const y = (rate) => 8 + height * (1 - rate / most);
    const nodes = [];
    const line = (className, values) =>
      svg("path", { class: className, d: values.map((value, b) => `${b ? "L" : "M"}${x(b).toFixed(1)} ${y(value).toFixed(1)}`).join("") });
    for (const part of [0, 0.5, 1]) {
      const rate = (most / 1.06) * part;
      nodes.push(svg("line", { class: "rule", x1: left, x2: left + width, y1: y(rate), y2: y(rate) }));
      nodes.push(svg("text", { class: "axis", x: left - 6, y: y(rate) + 4, "text-anchor": "end" }, part ? three(rate) : "0"));
    }
    for (const [name, values] of Object.entries(rates)) {
      if (name !== state.arm) nodes.push(line("other-arm", values.map(({ rate }) => rate)));
    }
    nodes.push(line("ideal-arm", rates[state.arm].map(({ ideal }) => ideal)));
    nodes.push(line("this-arm", rates[state.arm].map(({ rate }) => rate)));
    const at = x(state.budget);
    nodes.push(svg("line", { class: "now", x1: at, x2: at, y1: 8, y2: 8 + height }));
    nodes.push(svg("circle", { class: "dot", cx: at, cy: y(run().rate), r: 5 }));
    for (const b of width < 420 ? [1, 4, 7] : [0, 1, 2, 3, 4, 5, 6, 7, 8]) {
      nodes.push(svg("text", { class: "axis", x: x(b), y: height + 24, "text-anchor": "middle" }, percent(index.shares[b])));
    }
    nodes.push(svg("text", { class: "axis", x: left + width, y: height + 24, "text-anchor": "end" }, "all"));
    data.budgets.forEach((_, b) => {
      const from = b ? (x(b - 1) + x(b)) / 2 : left - 8;
      const to = b + 1 < data.budgets.length ? (x(b) + x(b + 1)) / 2 : left + width + 12;
      nodes.push(svg("rect", { class: "hit", "data-budget": b, x: from, y: 0, width: to - from, height: height + 26 }));
    });
    const label = `Tokens per second of ${state.arm} within every budget, from ${three(rates[state.arm][0].rate)} to ${three(rates[state.arm].at(-1).rate)}`;
    const legend = html(
      "div",
      { class: "explore-legend" },
      key("this-arm", state.arm),
      key("ideal-arm", "ideal with its locks"),
      key("other-arm", "the other eight"),
    );
    sweep.replaceChildren(picture(left + width + 12, height + 30, label, ...nodes), legend);
  }

  sweep.addEventListener("pointerdown", (event) => {
    const hit = event.target.closest("[data-budget]");
    if (!hit) return;
    state.budget = Number(hit.dataset.budget);
    show();
  });

  function drawHeadline({ rate, ideal, waiting }) {
    headline.replaceChildren(
      html("span", { class: "explore-big" }, three(rate)),
      html("span", {}, " tokens per second"),
      html(
        "span",
        { class: "arm-track" },
        html("span", { class: "arm-bar", style: `width:${Math.min(100, (100 * rate) / ideal).toFixed(2)}%` }),
      ),
      html("span", {}, `${percent(rate / ideal)} of the ideal ${three(ideal)}; waiting ${percent(waiting)} of the time`),
    );
  }

  // --- Words ---

  function say({ rate, ideal, waiting, account: { locked, ring, ringChunks, pageCache, read } }) {
    const budget = index.shares[state.budget] === null ? "in which everything fits" : `${percent(index.shares[state.budget])} of the weights`;
    const parts = [
      `${state.model} in ${data.format} on ${state.device} with ${state.arm}, within ${bytes(data.budgets[state.budget])} (${budget}): ` +
        `${three(rate)} tokens per second, where no run ${state.arm === "mmap" ? "with the locks of optimal" : "with these locks"} ` +
        `can do better than ${three(ideal)}.`,
      read
        ? `Each token reads ${bytes(read)} and takes ${time(1000 / rate)}; of that the computation waits ${percent(waiting)}.`
        : `Nothing is read; a token takes ${time(1000 / rate)}.`,
    ];
    if (state.arm === "mmap") parts.push(`The page cache has ${bytes(pageCache)}.`);
    else {
      parts.push(
        `Locked are ${bytes(locked)}${ring ? `; the ring has ${ringChunks} chunks, ${bytes(ring)}` : ""}.`,
      );
    }
    return parts.join(" ");
  }

  function sayCommand() {
    const plan = isPlan() ? state.arm : "optimal";
    const wanted = index.shares[state.budget];
    const budget = wanted === null ? `${data.budgets[state.budget]}B` : `${Math.round(100 * wanted)}%`;
    command.textContent =
      `refinfer simulate --shape ${state.model} --weights ${data.format} --positions ${index.positions} ` +
      `--device ${state.device} --plan ${plan} --budget ${budget} --prefetch-threads 1`;
    commandNote.textContent = isPlan() ? "" : `${state.arm} is a column of the table that it prints.`;
  }

  // --- Changes ---

  function draw() {
    if (!data || !root.clientWidth) return;
    const now = run();
    drawToken(now);
    drawCloseUp(now);
    drawAccount(now);
    drawGrid(now);
    drawAll();
    drawSweep();
  }

  /** Show the state, and draw it. */
  function apply() {
    cell.layer = Math.min(cell.layer, data.kinds[cell.kind].name === "lm_head" ? 0 : data.layers - 1);
    const now = run();
    const budget = `${share(state.budget)}, ${bytes(data.budgets[state.budget])}`;
    budgetLabel.textContent = `memory budget: ${budget}`;
    slider.setAttribute("aria-valuetext", budget);
    const arm = index.arms.find(({ name }) => name === state.arm);
    const device = index.devices.find(({ name }) => name === state.device);
    note.textContent = `${arm.name}: ${arm.about}. ${device.name}: ${device.source}.`;
    drawHeadline(now);
    words.textContent = say(now);
    sayCommand();
    draw();
  }

  /** Show what was chosen, once the data of its model are there. */
  function show() {
    for (const name of Object.keys(fields)) fields[name].select.value = state[name];
    slider.value = state.budget;
    const wanted = state.model;
    if (data?.model === wanted) {
      apply();
      return;
    }
    load(`schedule-${wanted}`, wanted).then(
      (loaded) => {
        if (wanted !== state.model) return;
        data = loaded;
        apply();
      },
      (error) => {
        words.textContent = `${error.message}.`;
      },
    );
  }

  show();
  whenWide(root, draw);
})();
