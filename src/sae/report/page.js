"use strict";
(async () => {
  const ROW = 28; // pixels, as in the style sheet
  const OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
  // The first is an inactive cell; then what stands out more from the paper is more active.
  const LIGHT = ["#dfdfdf", "#feba2c", "#ea7457", "#bf3984", "#7e03a8", "#0d0887"];
  const DARK = ["#3f3f46", "#7e03a8", "#bf3984", "#ea7457", "#feba2c", "#f0f921"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const $ = (id) => document.getElementById(id);

  function trouble(text) {
    $("trouble").textContent = text;
    $("trouble").hidden = false;
    $("count").textContent = "";
  }

  // ---- Reading what is packed (see _compact.py)

  async function unpack(id) {
    const text = atob($(`data-${id}`).textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  const unpackJson = async (id) => JSON.parse(new TextDecoder().decode(await unpack(id)));

  function varints(bytes) {
    let at = 0;
    const next = () => {
      let value = 0;
      for (let shift = 0; ; shift += 7) {
        const byte = bytes[at++];
        value |= (byte & 127) << shift;
        if (byte < 128) return value;
      }
    };
    return { next, rest: () => bytes.subarray(at) };
  }

  function readCells(bytes, n) {
    const read = varints(bytes);
    return [0, 1].map(() => {
      const values = new Uint16Array(n);
      for (let i = 0, last = 0; i < n; i++) {
        const step = read.next();
        values[i] = last += (step >>> 1) ^ -(step & 1);
      }
      return values;
    });
  }

  function readPoints(bytes, n) {
    const read = varints(bytes);
    const counts = Array.from({ length: n }, read.next);
    const places = counts.map((count) => {
      const found = new Uint32Array(count);
      for (let i = 0, last = 0; i < count; i++) found[i] = last += read.next();
      return found;
    });
    const levels = read.rest();
    let start = 0;
    return places.map((place) => ({ places: place, levels: levels.subarray(start, (start += place.length)) }));
  }

  // ---- Writing into the page: text stays text

  function make(tag, options = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "class") element.className = value;
      else if (name === "title") value && (element.title = value);
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  function number(value) {
    if (value === null) return "–";
    if (Math.abs(value) === Number.MAX_VALUE) return value < 0 ? "-∞" : "∞"; // see rounded() of _compact.py
    if (Number.isInteger(value) || Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
    if (Math.abs(value) < 0.001) return value.toExponential(1);
    return String(Number(value.toPrecision(Math.abs(value) < 0.01 ? 2 : 3)));
  }

  function significance(value) {
    if (value === null) return "–";
    if (value === 0) return "< 1e-300";
    return value < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(2)));
  }

  const text = (id) => (id < 0 ? "–" : data.pool[id]);
  const show = {
    number,
    p: significance,
    text,
    list: (ids) => ids.map(text).join(", ") || "–",
    feature: (i) => data.names[i],
  };
  const alignment = (form) => (form === "number" || form === "p" ? "number" : form);

  // ---- Start

  if (typeof DecompressionStream === "undefined") return trouble("This page needs a browser from 2023 or later.");
  let data;
  try {
    data = await unpackJson("main");
  } catch (error) {
    return trouble(`The file cannot be read; it may be cut off. (${error})`);
  }
  const names = data.names;
  const number_of = new Map(names.map((name, i) => [name, i]));
  const column = Object.fromEntries(data.columns.map((found) => [found.key, found]));
  const dead = new Set(data.dead);
  const collator = new Intl.Collator("en", { numeric: true });
  const lower = data.pool.map((found) => found.toLowerCase());
  const labels = data.columns.filter((found) => found.groupby);
  const searched = data.columns.filter((found) => found.form === "text" && found.searched);
  let order = [];
  let current = 0;
  let sorted = { key: null, descending: false };

  // ---- Filters

  function choices(select, found) {
    const ids = [...new Set(found.values)].filter((id) => id >= 0).sort((a, b) => collator.compare(text(a), text(b)));
    select.append(...ids.map((id) => make("option", { value: `${data.columns.indexOf(found)} ${id}` }, text(id))));
  }

  for (const found of labels) {
    const group = make("optgroup", { label: found.groupby });
    choices(group, found);
    $("label").append(group);
  }
  if (column.module) choices($("module"), column.module);
  const there = {
    labels: labels.length,
    sets: data.sets.some((ids) => ids.length),
    module: column.module,
    stability: column.stability,
    dead: dead.size,
  };
  for (const element of document.querySelectorAll("[data-needs]")) element.hidden = !there[element.dataset.needs];

  function filter() {
    const bounds = (id) => ($(id).value === "" ? null : Number($(id).value));
    const query = $("search").value.trim().toLowerCase();
    const term = $("term").value.trim().toLowerCase();
    const found = query && lower.map((word) => word.includes(query));
    const found_term = term && lower.map((word) => word.includes(term));
    const equal = [$("label").value, $("module").value].filter(Boolean).map((value) => {
      const [which, id] = value.split(" ").map(Number);
      return [data.columns[which].values, id];
    });
    const stable = bounds("stability");
    const least = bounds("least");
    const most = bounds("most");
    const density = column.density.values;
    order = names.map((_, i) => i).filter((i) => {
      if (dead.has(i) && !$("dead").checked) return false;
      if (query && !names[i].toLowerCase().includes(query)) {
        const named = searched.some(({ values }) => values[i] >= 0 && found[values[i]]);
        if (!named && !data.genes[i].some((id) => found[id]) && !data.sets[i].some((id) => found[id])) return false;
      }
      if (term && !data.sets[i].some((id) => found_term[id])) return false;
      if (!equal.every(([values, id]) => values[i] === id)) return false;
      if (stable !== null && !(column.stability.values[i] !== null && column.stability.values[i] >= stable)) return false;
      return (least === null || density[i] >= least) && (most === null || density[i] <= most);
    });
    sort();
  }

  function sort() {
    const { key, descending } = sorted;
    const sign = descending ? -1 : 1;
    const { form, values } = key === null ? {} : column[key];
    const written = form === "text" || form === "list";
    const value = written ? (i) => text(form === "list" ? (values[i][0] ?? -1) : values[i]) : (i) => values?.[i];
    const missing = written ? (i) => value(i) === "–" : (i) => value(i) === null;
    order.sort((a, b) => a - b);
    if (key === null) {
      if (descending) order.reverse();
    } else {
      // What is not known comes last, whichever way.
      order.sort(
        (a, b) =>
          missing(a) - missing(b) || (missing(a) ? 0 : sign * (written ? collator.compare(value(a), value(b)) : value(a) - value(b))),
      );
    }
    $("count").textContent = `${order.length.toLocaleString("en")} of ${names.length.toLocaleString("en")} features`;
    current = 0;
    $("scroll").scrollTop = 0;
    drawRows();
    drawFeatures();
  }

  // ---- The table: only the rows in sight are in the document

  const table = $("features");
  const [head, body] = [table.tHead, table.tBodies[0]];

  function drawHead() {
    const shown = data.columns.filter((found) => found.shown);
    table.querySelector("colgroup")?.remove();
    const group = make("colgroup");
    const widths = [6.5, ...shown.map((found) => found.width)];
    for (const width of widths) {
      const col = make("col");
      col.style.width = `${width}rem`;
      group.append(col);
    }
    table.style.width = `${widths.reduce((sum, width) => sum + width)}rem`;
    table.prepend(group);
    const heading = (key, title, help, form) => {
      const direction = sorted.key === key ? (sorted.descending ? "descending" : "ascending") : "none";
      const arrow = direction === "none" ? "" : sorted.descending ? " ↓" : " ↑";
      const click = () => {
        // Large numbers first; texts and p-values from the start.
        const start = form === "number";
        sorted = { key, descending: sorted.key === key ? !sorted.descending : start };
        drawHead();
        sort();
        head.querySelector(`[data-key="${CSS.escape(String(key))}"]`).focus();
      };
      const button = make("button", { type: "button", title: help || title, "data-key": String(key), onclick: click }, title + arrow);
      return make("th", { scope: "col", class: alignment(form), "aria-sort": direction }, button);
    };
    const row = make("tr", { "aria-rowindex": 1 }, heading(null, "feature", "", "text"));
    row.append(...shown.map((found) => heading(found.key, found.title, found.help, found.form)));
    head.replaceChildren(row);
  }

  function filler(rows) {
    const cell = make("td", { colspan: 99 });
    cell.style.height = `${rows * ROW}px`;
    return make("tr", { class: "filler", "aria-hidden": "true" }, cell);
  }

  function drawRows() {
    const shown = data.columns.filter((found) => found.shown);
    const first = Math.max(0, Math.floor($("scroll").scrollTop / ROW) - 10);
    const last = Math.min(order.length, first + Math.ceil($("scroll").clientHeight / ROW) + 20);
    const rows = order.slice(first, last).map((i, offset) => {
      const place = first + offset;
      const row = make("tr", { id: `row${place}`, "aria-rowindex": place + 2, "aria-selected": place === current });
      if (place === current) row.className = "current";
      row.append(make("td", {}, names[i]));
      for (const { form, values } of shown) {
        const written = show[form](values[i]);
        row.append(make("td", { class: alignment(form), title: written.length > 12 ? written : "" }, written));
      }
      row.addEventListener("click", () => {
        move(place);
        open(i);
      });
      return row;
    });
    const above = first ? [filler(first)] : [];
    const below = last < order.length ? [filler(order.length - last)] : [];
    body.replaceChildren(...above, ...rows, ...below);
    table.setAttribute("aria-rowcount", order.length + 1);
    if (current >= first && current < last) table.setAttribute("aria-activedescendant", `row${current}`);
    else table.removeAttribute("aria-activedescendant");
  }

  function move(place) {
    if (!order.length) return;
    current = Math.max(0, Math.min(order.length - 1, place));
    const scroll = $("scroll");
    const room = scroll.clientHeight - head.offsetHeight - ROW;
    scroll.scrollTop = Math.max(Math.min(scroll.scrollTop, current * ROW), current * ROW - room);
    drawRows();
    drawFeatures();
  }

  let waiting = false;
  function drawRowsSoon() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawRows();
    });
  }

  $("scroll").addEventListener("scroll", drawRowsSoon);
  addEventListener("resize", drawRowsSoon);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(filter));
  for (const element of $("filters").querySelectorAll("input, select")) element.addEventListener("input", filter);
  $("chooser").lastElementChild.append(
    ...data.columns.map((found) => {
      const box = make("input", { type: "checkbox" });
      box.checked = box.defaultChecked = found.shown;
      const change = (shown) => {
        found.shown = shown;
        drawHead();
        drawRows();
      };
      box.addEventListener("change", () => change(box.checked));
      const initially = found.shown;
      $("filters").addEventListener("reset", () => change(initially));
      return make("label", { title: found.help }, box, found.groupby_of ? `${found.groupby_of} ${found.title}` : found.title);
    }),
  );

  // ---- Drawing on canvas

  function sharp(canvas) {
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    const brush = canvas.getContext("2d");
    brush.scale(devicePixelRatio, devicePixelRatio);
    return { brush, width, height };
  }

  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

  function color(level) {
    const stops = dark.matches ? DARK : LIGHT;
    const at = (level / 255) * (stops.length - 1);
    const below = Math.min(Math.floor(at), stops.length - 2);
    const [from, to] = [rgb(stops[below]), rgb(stops[below + 1])];
    return `rgb(${from.map((value, k) => Math.round(value + (to[k] - value) * (at - below))).join()})`;
  }

  let cells = null;
  function readAllCells() {
    cells ??= unpack("cells").then((bytes) => readCells(bytes, data.cells.n));
    return cells;
  }

  function drawCells(canvas, [xs, ys], { places, levels }, groupby) {
    const { brush, width, height } = sharp(canvas);
    const size = Math.min(6, Math.max(1.5, 330 / Math.sqrt(xs.length)));
    const margin = 10;
    const at = (x, y) => [margin + (x / 4095) * (width - 2 * margin), height - margin - (y / 4095) * (height - 2 * margin)];
    const dot = (place, wide) => {
      const [x, y] = at(xs[place], ys[place]);
      if (size < 3) return brush.fillRect(x - wide / 2, y - wide / 2, wide, wide);
      brush.beginPath();
      brush.arc(x, y, wide / 2, 0, 2 * Math.PI);
      brush.fill();
    };
    brush.fillStyle = color(0);
    for (let place = 0; place < xs.length; place++) dot(place, size);
    // The most active last, on top.
    const upwards = Array.from(places.keys()).sort((a, b) => levels[a] - levels[b]);
    for (const k of upwards) {
      brush.fillStyle = color(levels[k]);
      dot(places[k], size + 0.7);
    }
    const style = getComputedStyle(document.documentElement);
    brush.font = "600 11px system-ui, sans-serif";
    brush.textAlign = "center";
    brush.lineWidth = 3;
    brush.lineJoin = "round";
    brush.strokeStyle = style.getPropertyValue("--paper");
    brush.fillStyle = style.getPropertyValue("--text");
    const taken = [];
    for (const [id, x, y] of data.cells.labels[groupby] ?? []) {
      const written = text(id);
      const half = brush.measureText(written).width / 2 + 2;
      const [left, middle] = at(x, y);
      const center = Math.max(half, Math.min(width - half, left));
      const free = (line) => taken.every(([c, h, l]) => Math.abs(c - center) > h + half || Math.abs(l - line) > 11);
      // Beside where it belongs if another is there.
      const near = [0, 1, -1, 2, -2, 3, -3, 4, -4].map((k) => middle + 12 * k);
      const line = near.find((l) => l > 12 && l < height - 4 && free(l)) ?? middle;
      taken.push([center, half, line]);
      brush.strokeText(written, center, line);
      brush.fillText(written, center, line);
    }
  }

  // ---- The map of the features

  const map = $("map");
  const modules = column.module && [...new Set(column.module.values)].filter((id) => id >= 0);
  if (modules) {
    const count = new Map();
    for (const id of column.module.values) count.set(id, (count.get(id) ?? 0) + 1);
    modules.sort((a, b) => count.get(b) - count.get(a));
  }
  let spots = [];

  function drawFeatures() {
    if (!map) return;
    const { brush, width, height } = sharp(map);
    const { x, y } = data.map;
    const known = names.map((_, i) => i).filter((i) => x[i] !== null && y[i] !== null);
    const span = (values) => known.reduce(([low, high], i) => [Math.min(low, values[i]), Math.max(high, values[i])], [Infinity, -Infinity]);
    const [left, right] = span(x);
    const [bottom, top] = span(y);
    const scale = (value, low, high) => (high > low ? (value - low) / (high - low) : 0.5);
    const chosen = new Set(order);
    const radius = Math.min(4.5, Math.max(1.5, 60 / Math.sqrt(known.length)));
    spots = known.map((i) => [i, 10 + scale(x[i], left, right) * (width - 20), height - 10 - scale(y[i], bottom, top) * (height - 20)]);
    const circle = (cx, cy, r) => {
      brush.beginPath();
      brush.arc(cx, cy, r, 0, 2 * Math.PI);
    };
    for (const [i, cx, cy] of spots) {
      const rank = modules ? modules.indexOf(column.module.values[i]) : 0;
      brush.globalAlpha = chosen.has(i) ? 1 : 0.15;
      brush.fillStyle = rank < 0 ? "#888888" : OKABE_ITO[rank % OKABE_ITO.length];
      circle(cx, cy, radius);
      brush.fill();
    }
    brush.globalAlpha = 1;
    brush.lineWidth = 2;
    brush.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--text");
    for (const [i, cx, cy] of spots) {
      if (i !== order[current]) continue;
      circle(cx, cy, radius + 3);
      brush.stroke();
    }
  }

  function nearest(event) {
    let [best, least] = [null, 15 ** 2];
    for (const [i, x, y] of spots) {
      const distance = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }

  if (map) {
    const usual = $("under").textContent;
    map.addEventListener("mousemove", (event) => {
      const i = nearest(event);
      const named = i !== null && text(column.name.values[i]);
      const module = i !== null && column.module ? ` (module ${text(column.module.values[i])})` : "";
      $("under").textContent = i === null ? usual : (named === names[i] ? named : `${names[i]}: ${named}`) + module;
    });
    map.addEventListener("mouseleave", () => ($("under").textContent = usual));
    map.addEventListener("click", (event) => {
      const i = nearest(event);
      if (i !== null) open(i);
    });
  }

  // ---- The card: the address says which one is open

  const card = $("card");
  const blocks = new Map();
  let shown = null;

  function block(b) {
    if (!blocks.has(b)) {
      const n = Math.min(data.block, names.length - b * data.block);
      const points = data.cells ? unpack(`points${b}`).then((bytes) => readPoints(bytes, n)) : null;
      blocks.set(b, Promise.all([unpackJson(`block${b}`), points]));
    }
    return blocks.get(b);
  }

  const address = (i) => `#${encodeURIComponent(names[i])}`;
  const open = (i) => (location.hash = address(i));

  function asked() {
    try {
      return number_of.get(decodeURIComponent(location.hash.slice(1)));
    } catch {
      return undefined;
    }
  }

  function rows({ spec, part }, i) {
    const [begin, end] = [part.start[i], part.start[i + 1]];
    return Array.from({ length: end - begin }, (_, k) =>
      make(
        "tr",
        {},
        ...spec.columns.map(({ form }, c) => {
          const value = part.values[c][begin + k];
          if (form !== "feature") return make("td", { class: alignment(form) }, show[form](value));
          const named = text(column.name.values[value]);
          const link = make("a", { href: address(value) }, names[value]);
          return make("td", {}, link, named === names[value] ? "" : ` ${named}`);
        }),
      ),
    );
  }

  function drawTable(spec, part, i) {
    const found = rows({ spec, part }, i);
    const title = make("h3", {}, spec.kind === "labels" ? `Labels: ${spec.title}` : spec.title);
    const note = spec.note ? [make("p", { class: "note" }, spec.note)] : [];
    if (!found.length) return make("section", { class: spec.kind }, title, make("p", { class: "note" }, "none"));
    const heads = spec.columns.map((c) => make("th", { scope: "col", class: alignment(c.form), title: c.help }, c.title));
    const made = make("table", { "aria-label": spec.title }, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...found));
    return make("section", { class: spec.kind }, title, ...note, made);
  }

  function drawHistogram(counts, highest, active) {
    const svg = (tag, options, ...children) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(options)) element.setAttribute(name, value);
      element.append(...children);
      return element;
    };
    const [width, height, left, base, top] = [420, 130, 38, 108, 12];
    const most = Math.max(...counts, 1);
    const step = (width - left - 8) / counts.length;
    const bars = counts.map((count, k) => {
      const tall = (count / most) * (base - top);
      const range = `${number((k / counts.length) * highest)} to ${number(((k + 1) / counts.length) * highest)}`;
      const hint = svg("title", {}, `${range}: ${count.toLocaleString("en")} cells`);
      return svg("rect", { x: left + k * step, y: base - tall, width: step - 1, height: tall }, hint);
    });
    const inactive = data.n_cells - active;
    const told = `Activation of ${active.toLocaleString("en")} active cells; ${inactive.toLocaleString("en")} are inactive`;
    return make(
      "section",
      {},
      make("h3", {}, "Activations"),
      make("p", { class: "note" }, told),
      !active ? "" : svg(
        "svg",
        { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram. ${told}; the largest is ${number(highest)}.` },
        svg("line", { x1: left, x2: width - 8, y1: base, y2: base }),
        ...bars,
        svg("text", { x: left - 4, y: top + 8, "text-anchor": "end" }, number(most)),
        svg("text", { x: left - 4, y: base, "text-anchor": "end" }, "0"),
        svg("text", { x: left, y: base + 14 }, "0"),
        svg("text", { x: (left + width) / 2, y: base + 18, "text-anchor": "middle" }, "activation"),
        svg("text", { x: width - 8, y: base + 14, "text-anchor": "end" }, number(highest)),
      ),
    );
  }

  let written = Object.keys(data.cells?.labels ?? {})[0] ?? "";
  let redraw = () => {};

  // The canvas is drawn by redraw() once it is in the page and has a size.
  function makeMap(i, found, points) {
    const [one, other] = data.cells.axes;
    const count = (value) => value.toLocaleString("en");
    const drawn = count(points.places.length);
    const aria = `Cells on ${one} and ${other}, coloured by the activation of ${names[i]}: ${drawn} active cells are drawn.`;
    const canvas = make("canvas", { role: "img", "aria-label": aria });
    const bar = make("i", { "aria-hidden": "true" });
    const select = make("select", {}, make("option", { value: "" }, "none"));
    select.append(...Object.keys(data.cells.labels).map((groupby) => make("option", { value: groupby }, groupby)));
    select.value = written;
    select.addEventListener("input", () => {
      written = select.value;
      redraw();
    });
    redraw = () => {
      bar.style.background = `linear-gradient(to right, ${(dark.matches ? DARK : LIGHT).join()})`;
      drawCells(canvas, found, points, written);
    };
    const legend = make("div", { class: "legend" }, "0", bar, number(column.max.values[i]));
    if (select.length > 1) legend.append(make("label", {}, "names", select));
    const cells_drawn = `${count(data.cells.n)} of ${count(data.n_cells)} cells`;
    const note = `${one} across, ${other} up. Drawn: ${cells_drawn}, ${drawn} of ${count(column.n_cells.values[i])} active ones.`;
    return make("section", {}, canvas, legend, make("p", { class: "note" }, note));
  }

  function makeNumbers(i, own) {
    const columns = data.columns.filter((found) => found.own === own);
    const one = ({ title, help, form, values }) => make("div", { title: help }, make("dt", {}, title), make("dd", {}, show[form](values[i])));
    return make("dl", {}, ...columns.map(one));
  }

  async function drawCard(i) {
    const [{ tables, histogram }, points] = await block(Math.floor(i / data.block));
    const found = data.cells && (await readAllCells());
    if (shown !== i) return;
    const within = i % data.block;
    const made = data.tables.map((spec, t) => drawTable(spec, tables[t], within));
    const of = (...kinds) => made.filter((_, t) => kinds.includes(data.tables[t].kind));
    redraw = () => {};
    const side = make("div", {}, ...(found ? [makeMap(i, found, points[within])] : []));
    side.append(drawHistogram(histogram[within], column.max.values[i], column.n_cells.values[i]), ...of("similar"));
    const rest = make("div", {}, make("section", { "aria-label": "Numbers" }, makeNumbers(i, true)), ...of("labels"));
    rest.append(make("div", { class: "pair" }, ...of("genes")), ...of("sets", "perturbations"));
    const more = makeNumbers(i, false);
    if (more.childElementCount) rest.append(make("details", {}, make("summary", {}, "All other columns"), more));
    $("content").replaceChildren(side, rest);
    redraw();
    card.scrollTop = 0;
    performance.mark("card");
  }

  function drawTitle(i) {
    const named = text(column.name.values[i]);
    $("title").replaceChildren(names[i], make("span", {}, named === names[i] ? "" : `  ${named}`));
    const place = order.indexOf(i);
    $("position").textContent = place < 0 ? "not among the chosen features" : `${place + 1} of ${order.length}`;
    $("previous").disabled = place <= 0 && place !== -1;
    $("next").disabled = place === order.length - 1;
    if (place >= 0) move(place);
  }

  function display(i) {
    shown = i;
    if (i === null) return card.close();
    drawTitle(i);
    if (!card.open) card.showModal();
    // Else what has the focus is about to go, or can no longer be pressed.
    else if (!document.activeElement.matches("nav button:enabled")) $("title").focus({ preventScroll: true });
    drawCard(i).catch((error) => {
      $("content").replaceChildren(make("p", { class: "trouble" }, `The card cannot be read; the file may be cut off. (${error})`));
    });
  }

  function follow() {
    const i = asked() ?? null;
    if (i !== shown) display(i);
  }

  function step(by) {
    const place = order.indexOf(shown);
    const to = place < 0 ? order[current] : order[place + by];
    if (to === undefined) return;
    display(to);
    location.replace(address(to));
  }

  card.addEventListener("close", () => {
    if (card.open) return;
    shown = null;
    if (location.hash) history.replaceState(null, "", location.href.split("#")[0]);
    table.focus({ preventScroll: true });
  });
  card.addEventListener("click", (event) => event.target === card && card.close());
  $("close").addEventListener("click", () => card.close());
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  addEventListener("hashchange", follow);
  dark.addEventListener("change", () => {
    redraw();
    drawFeatures();
  });

  // ---- Keys

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest?.("input:not([type=checkbox]), select");
    const key = event.key;
    let done = true;
    if (card.open) {
      if (typing) return;
      if (key === "ArrowLeft" || key === "k") step(-1);
      else if (key === "ArrowRight" || key === "j") step(1);
      else done = false;
    } else if (key === "/" && !typing) {
      $("search").focus();
      $("search").select();
    } else if (typing) {
      if (typing.id === "search" && (key === "Enter" || key === "ArrowDown")) table.focus();
      else done = false;
    } else {
      const page = Math.floor($("scroll").clientHeight / ROW) - 2;
      const places = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -order.length, End: order.length };
      const elsewhere = event.target.closest?.("button, summary, a, input");
      if (key in places) {
        table.focus({ preventScroll: true });
        move(current + places[key]);
      } else if (key === "Enter" && !elsewhere && order.length) open(order[current]);
      else done = false;
    }
    if (done) event.preventDefault();
  });

  drawHead();
  filter();
  follow();
  performance.mark("ready");
  document.body.dataset.ready = "";
})();
