// What both explorables share: making elements, loading data, moving about in a picture with arrow keys.
// Nothing is computed here or in them: Python wrote what they look up (tests/pages/explore_data.py).
"use strict";

self.refinferExplore = (() => {
  const folder = new URL(".", document.currentScript.src);
  const SVG = "http://www.w3.org/2000/svg";

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  /** A picture that fills its place, drawn in pixels: texts keep their size on a phone. */
  function picture(width, height, about, ...children) {
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": about }, ...children);
  }

  /** Load data/NAME.js, once. A script is what a page may load from a folder too, where fetch is not allowed. */
  const loading = {};
  function load(file, name) {
    loading[name] ??= new Promise((resolve, reject) => {
      const failed = () => {
        delete loading[name];
        reject(new Error(`data/${file}.js cannot be loaded`));
      };
      const script = html("script", { src: new URL(`data/${file}.js`, folder).href, onerror: failed });
      script.addEventListener("load", () => resolve(self.refinferData[name]));
      document.head.append(script);
    });
    return loading[name];
  }

  /** A select with its label; options are {value, text}. */
  function choice(id, label, options, onchange) {
    const select = html("select", { id, onchange: () => onchange(select.value) });
    for (const { value, text } of options) select.append(html("option", { value }, text));
    return { box: html("div", { class: "explore-field" }, html("label", { for: id }, label), select), select };
  }

  /** Evenly spaced whole numbers, written as first, step, count, and so on. */
  function expand(runs) {
    const numbers = [];
    for (let i = 0; i < runs.length; i += 3) {
      for (let j = 0; j < runs[i + 2]; j++) numbers.push(runs[i] + j * runs[i + 1]);
    }
    return numbers;
  }

  /** A place between 0 and 1, written in so many digits of base 36. */
  const place = (digits) => parseInt(digits, 36) / (36 ** digits.length - 1);

  /** Bytes as refinfer prints them, in powers of ten. */
  function bytes(n) {
    for (const unit of ["bytes", "kB", "MB"]) {
      if (n < 1000) return `${n.toFixed(n >= 100 || unit === "bytes" ? 0 : 1)} ${unit}`;
      n /= 1000;
    }
    return `${n.toFixed(1)} GB`;
  }

  /** Call `moved(dx, dy)` for the arrow keys, and `moved(-Infinity, 0)` or `(Infinity, 0)` for Home and End. */
  function arrows(node, moved) {
    const keys = {
      ArrowLeft: [-1, 0],
      ArrowRight: [1, 0],
      ArrowUp: [0, -1],
      ArrowDown: [0, 1],
      Home: [-Infinity, 0],
      End: [Infinity, 0],
    };
    node.addEventListener("keydown", (event) => {
      const by = keys[event.key];
      if (!by || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      moved(...by);
    });
  }

  /** Call `over(cell)` with the element under mouse, pen or finger that has the attribute, also while it moves. */
  function points(node, attribute, over) {
    const at = (event) => {
      const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest(`[${attribute}]`);
      if (cell && node.contains(cell)) over(cell);
    };
    node.addEventListener("pointermove", at);
    node.addEventListener("pointerdown", at);
  }

  /** Draw now, and again whenever the width of the place changes. */
  function whenWide(node, draw) {
    let width = 0;
    new ResizeObserver(() => {
      if (node.clientWidth && node.clientWidth !== width) {
        width = node.clientWidth;
        draw();
      }
    }).observe(node);
  }

  // Every page of the site has this script (mkdocs.yml), and this asks for the others. A page names none of them: a view
  // of the repository would show that as text.
  for (const name of ["packing", "schedule"]) {
    if (!document.getElementById(`${name}-explorer`)) continue;
    for (const file of [`data/${name}.js`, `${name}.js`]) {
      const script = html("script", { src: new URL(file, folder).href });
      script.async = false; // in this order
      document.head.append(script);
    }
  }

  return { html, svg, picture, load, choice, expand, place, bytes, arrows, points, whenWide };
})();
