"use strict";
// All text of the dataset goes in as text nodes, never as markup.
const { words, samples } = JSON.parse(document.getElementById("data").textContent);
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const SIGNS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
let mode = "relation";
let centred = null; // null: as each relation needs it

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const word = (id) => words[id] ?? `#${id}`;
const signs = (text) => text.replace(/[ \n\t\r]/g, (c) => SIGNS[c]);
const figure = (x) => (Math.abs(x) < 1000 ? x.toFixed(2) : x.toExponential(1));
const percent = (p) => (p < 0.0001 && p > 0 ? "< 0.01" : (100 * p).toFixed(p < 0.01 ? 2 : 1)) + " %";

// One stop for the tab key in a group; the arrow keys move inside it and choose what they reach.
function keys(group, items, columns, choose) {
  const stop = (place) => items.forEach((item, i) => (item.tabIndex = i === place ? 0 : -1));
  stop(0);
  group.addEventListener("keydown", (event) => {
    const at = items.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? items.length - 1 : at + step;
    if (at < 0 || Number.isNaN(to) || !items[to]) return;
    event.preventDefault();
    items[to].focus();
    choose(to);
  });
  return stop;
}

function bars(entries, labelId, outside) {
  const box = el("div", { class: "bars" });
  const row = (text, p, kind) => {
    const bar = el("i");
    bar.style.width = `${100 * p}%`;
    box.append(el("span", { class: `mono ${kind}`, title: text }, text), el("span", { class: "track" }, bar),
      el("span", { class: "share" }, percent(p)));
  };
  for (const [id, p] of entries) row(signs(word(id)), p, id === labelId ? "label" : "");
  if (outside !== null) row("all others", outside, "outside");
  return box;
}

function showList() {
  const list = document.getElementById("list");
  const items = samples.map((sample, number) => {
    const share = sample.scores ? sample.scores.disagreement : null;
    const meter = el("span", { class: "meter" }, el("i"));
    meter.firstChild.style.width = `${100 * (share ?? 0)}%`;
    return el("button", { type: "button", onclick: () => choose(number) },
      `row ${sample.row}`,
      el("span", { class: "faint" }, sample.id),
      el("span", { class: "faint" }, share === null ? "no response targets" : `disagreement ${percent(share)}`), meter);
  });
  list.append(...items.map((item) => el("li", {}, item)));
  const stop = keys(list, items, 1, choose);
  function choose(number) {
    stop(number);
    items.forEach((item, i) => item.setAttribute("aria-current", i === number));
    showSample(samples[number]);
  }
  if (items.length) choose(0);
}

function showSample(sample) {
  const box = document.getElementById("sample");
  const s = sample.scores;
  const facts = [`${sample.length} tokens`];
  if (s) facts.push(`confidence ${s.confidence.toFixed(3)}`, `disagreement ${s.disagreement.toFixed(3)}`);
  if (s && s.perplexity !== null) facts.push(`perplexity ${s.perplexity.toPrecision(3)}`);
  box.replaceChildren(
    el("div", { class: "panel" }, el("h3", {}, `row ${sample.row}`, " ", el("span", { class: "mono faint" }, sample.id)),
      el("p", { class: "faint" }, facts.join("  ·  "))),
    conversation(sample), ...sample.images.map(picture));
}

function conversation(sample) {
  const flow = el("div", { class: "flow", role: "listbox", "aria-label": "Conversation, token by token" });
  const detail = el("div", { id: "token-detail", "aria-live": "polite" });
  const at = new Map(sample.response.map((entry, n) => [entry.position + 1, n]));
  const items = [];
  for (const token of sample.tokens) {
    if (token.role === "visual") {
      flow.append(el("span", { class: "visual" }, `image ${token.image}: ${token.count} tokens`), " ");
    } else if (at.has(token.position)) {
      const n = at.get(token.position);
      const bare = token.text.trimStart();
      items[n] = el("span", { role: "option", "aria-selected": "false", onclick: () => choose(n), onmouseenter: () => show(n),
        onmouseleave: () => show(chosen), class: sample.response[n].agrees ? null : "wrong" }, bare || signs(token.text) || "·");
      flow.append(token.text.slice(0, token.text.length - bare.length), items[n]);
    } else flow.append(el("span", { class: token.role }, token.text));
  }
  // A position whose label is itself a visual token has no word of its own to press.
  const present = items.map((item, n) => n).filter((n) => items[n]);
  const stop = keys(flow, present.map((n) => items[n]), 1, (place) => choose(present[place]));
  let chosen = present[0];
  function show(n) {
    const entry = sample.response[n];
    detail.replaceChildren(
      el("h3", {}, "label ", el("span", { class: "mono response" }, signs(word(entry.label_id))),
        entry.label_probability === null ? "" : ` has ${percent(entry.label_probability)}`),
      bars(entry.top, entry.label_id, entry.outside),
      el("p", { class: "faint" }, `position ${entry.position}, ` +
        (entry.entropy === null ? "" : `entropy ${entry.entropy.toFixed(2)} nats, `) +
        (entry.label_rank === null ? "the label is not among the kept entries" : `the label is entry ${entry.label_rank + 1}`)));
  }
  function choose(n) {
    chosen = n;
    stop(present.indexOf(n));
    present.forEach((i) => items[i].setAttribute("aria-selected", i === n));
    show(n);
  }
  const wrong = sample.response.filter((entry) => !entry.agrees).length;
  const legend = el("p", { class: "faint" }, el("span", { class: "prompt" }, "prompt"), "  ",
    el("span", { class: "visual" }, "visual"), "  ", el("span", { class: "response" }, "response"), "  ",
    `${sample.response.length} response positions, the teacher's most likely token is another one at ${wrong}`);
  if (present.length) choose(sample.response.findIndex((entry, n) => items[n] && !entry.agrees) >= 0
    ? sample.response.findIndex((entry, n) => items[n] && !entry.agrees) : present[0]);
  return el("div", { class: "panel look" }, el("div", {}, legend, flow), detail);
}

function picture(image, number) {
  const { layers, apart, note } = image.layout;
  const detail = el("div", { class: "patch-detail", "aria-live": "polite" });
  const low = el("span"), high = el("span");
  const factor = image.relation ? unpack(image.relation) : null;
  const items = []; // by token, whatever grid it stands in
  const told = []; // by token, how it is called
  const stops = []; // of each group of tokens, where its one stop for the tab key is
  let chosen = 0;

  function token(place, text) {
    told[place] = text;
    return (items[place] = el("button", { type: "button", role: "option", "aria-label": text, "aria-selected": "false",
      onclick: () => choose(place), onmouseenter: () => show(place), onmouseleave: () => show(chosen) }));
  }
  function group(label, kind, places, columns, name) {
    const box = el("div", { class: kind, role: "listbox", "aria-label": `${label} of image ${number}` });
    const buttons = places.map((place, n) => (place < 0 ? el("span") : token(place, name(n, place))));
    box.append(...buttons);
    const real = places.filter((place) => place >= 0);
    const stop = keys(box, real.map((place) => items[place]), columns, (n) => choose(real[n]));
    stops.push((place) => { if (real.includes(place)) stop(real.indexOf(place)); });
    return box;
  }
  const ahead = layers.length > 1 ? (layer) => `${layer.name}, ` : () => "";
  const figures = layers.map((layer) => {
    const { rows, columns, box } = layer, [left, top, right, bottom] = box ?? [0, 0, 1, 1];
    const percents = { left: 100 * left, top: 100 * top, width: 100 * (right - left), height: 100 * (bottom - top) };
    const lay = (node, names) => { for (const name of names) node.style[name] = `${percents[name]}%`; };
    const canvas = el("canvas", { width: columns, height: rows });
    const grid = group(`Patches, ${layer.name},`, "grid", layer.tokens.flat(), columns, (n, place) => box
      ? `${ahead(layer)}patch at row ${Math.floor(n / columns)}, column ${n % columns}` : `token ${place} of the image`);
    grid.style.gridTemplate = `repeat(${rows}, minmax(0, 1fr)) / repeat(${columns}, minmax(0, 1fr))`;
    const stage = el("div", { class: "stage" }, image.picture && box ? el("img", { src: image.picture, alt: image.path }) : null, canvas, grid);
    for (const node of [canvas, grid]) lay(node, ["left", "top", "width", "height"]);
    stage.classList.toggle("blank", !(image.picture && box));
    stage.style.aspectRatio = box ? image.aspect : columns / rows;
    const frame = el("div", { class: "framed" }, stage);
    if (layer.row_ends.length) {
      const ends = group(`Row ends, ${layer.name},`, "ends", layer.row_ends, 1, (n) => `${ahead(layer)}end of row ${n}`);
      ends.style.gridTemplate = `repeat(${rows}, minmax(0, 1fr)) / 1fr`;
      lay(ends, ["top", "height"]);
      frame.append(el("div", { class: "beside" }, ends));
    }
    const caption = layers.length > 1 || layer.row_ends.length ? el("figcaption", { class: "faint" },
      `${layer.name}, ${rows} x ${columns}` + (layer.row_ends.length ? "; at the right the tokens that end each row" : "")) : null;
    const whole = el("figure", {}, frame, caption);
    whole.style.maxWidth = `min(27rem, ${30 * (box ? image.aspect : columns / rows)}rem)`;
    return { layer, canvas, stage, whole };
  });
  const others = apart.length ? el("div", { class: "tools" }, el("span", { class: "faint" }, "on no part of the picture:"),
    group("Tokens apart", "apart", apart, 1, (n, place) => `token ${place} of the image`)) : null;

  function values(place) {
    if (mode === "entropy") return image.visual.entropy;
    return mode === "relation" && factor ? relationRow(factor, place, mean.checked) : null;
  }
  function show(place) {
    const field = values(place);
    const laid = layers.flatMap((layer) => layer.tokens.flat()).filter((at) => at >= 0);
    const range = field ? [Math.min(...laid.map((at) => field[at])), Math.max(...laid.map((at) => field[at]))] : null;
    for (const { layer, canvas } of figures) {
      paint(canvas, field, layer.tokens.flat(), range, image.picture && layer.box);
      for (const end of layer.row_ends) items[end].style.background = field ? `rgb(${colour(field[end], range)})` : "";
    }
    low.textContent = range ? figure(range[0]) : "";
    high.textContent = range ? figure(range[1]) : "";
    detail.replaceChildren(el("h3", {}, told[place]));
    if (image.visual) {
      detail.append(bars(image.visual.top[place], null, image.visual.outside[place]),
        el("p", { class: "faint" }, `position ${image.visual.positions[place]}, entropy ${image.visual.entropy[place].toFixed(2)} nats`));
    }
    if (factor) detail.append(el("p", { class: "faint" }, "relation: "
      + (image.relation.rank === null ? "exact" : `rank ${image.relation.rank}`)
      + `, residual ${image.relation.residual.toExponential(1)}, norm ${image.relation.norm.toExponential(2)}`));
  }
  function choose(place) {
    chosen = place;
    stops.forEach((stop) => stop(place));
    items.forEach((item, i) => item.setAttribute("aria-selected", i === place));
    show(place);
  }
  function redraw() {
    const wide = mode === "words" && layers.some((layer) => layer.columns > 12);
    look.classList.toggle("wide", wide);
    for (const { layer, stage } of figures) {
      stage.classList.toggle("words", mode === "words");
      let before = null;
      for (const place of layer.tokens.flat().filter((at) => at >= 0)) {
        const id = image.visual ? image.visual.top[place][0][0] : null;
        items[place].textContent = mode === "words" && id !== null ? signs(word(id)) : "";
        items[place].classList.toggle("same", id !== null && id === before);
        before = id;
      }
    }
    legend.style.visibility = mode === "relation" || mode === "entropy" ? "visible" : "hidden";
    show(chosen);
  }
  const modes = [["relation", "relation of the chosen patch", image.relation], ["words", "the teacher's most likely tokens", image.visual],
    ["entropy", "entropy", image.visual], ["none", "picture only", true]].filter((entry) => entry[2]);
  if (!modes.some((entry) => entry[0] === mode)) mode = modes[0][0];
  const choice = el("select", { "aria-label": "What lies over the picture", onchange: () => { mode = choice.value; redraw(); } },
    ...modes.map(([value, text]) => el("option", { value, selected: value === mode ? "" : null }, text)));
  // Of the few columns of a low rank hardly anything is left when the mean is taken away.
  const rich = image.relation && (image.relation.rank === null || image.relation.rank >= 4);
  const mean = el("input", { type: "checkbox", checked: (centred ?? rich) ? "" : null,
    onchange: () => { centred = mean.checked; redraw(); } });
  const legend = el("div", { class: "legend" }, low, el("i"), high);
  const stages = el("div", { class: "stages" }, ...figures.map(({ whole }) => whole));
  const look = el("div", { class: layers.length > 1 ? "look two" : "look" }, el("div", {}, stages, others, legend), detail);
  const { rows, columns, tokens } = layers[layers.length - 1];
  choose(Math.max(tokens[Math.floor(rows / 2)][Math.floor(columns / 2)], 0));
  redraw();
  const onPicture = layers.every((layer) => layer.box);
  return el("div", { class: "panel" },
    el("div", { class: "tools" }, el("h3", {}, `image ${number} `, el("span", { class: "mono faint" }, image.path)), choice,
      image.relation ? el("label", {}, mean, " mean removed") : null),
    ...[image.note, note].filter(Boolean).map((text) => el("p", { class: "note" }, text)),
    look, image.picture && !onPicture ? el("p", {}, el("img", { class: "plain", src: image.picture, alt: image.path })) : null);
}

function unpack(relation) {
  const bytes = Uint8Array.from(atob(relation.columns), (c) => c.charCodeAt(0));
  const levels = new Int8Array(bytes.buffer);
  const rank = relation.scales.length, tokens = levels.length / rank;
  const rows = [];
  for (let p = 0; p < tokens; p++) rows.push(Float64Array.from(relation.scales, (scale, c) => scale * levels[c * tokens + p]));
  const mean = new Float64Array(rank);
  for (const row of rows) row.forEach((x, c) => (mean[c] += x / tokens));
  return { raw: rows, centred: rows.map((row) => row.map((x, c) => x - mean[c])) };
}

// The row of R of the patch at `place`; without the mean over the image, as cosines.
function relationRow(factor, place, removeMean) {
  const rows = removeMean ? factor.centred : factor.raw;
  const dot = (a, b) => a.reduce((sum, x, c) => sum + x * b[c], 0);
  if (!removeMean) return rows.map((row) => dot(row, rows[place]));
  const own = rows[place], norm = Math.sqrt(dot(own, own));
  return rows.map((row) => {
    const size = Math.sqrt(dot(row, row)) * norm;
    return size > 0 ? dot(row, own) / size : 0;
  });
}

function colour(value, [low, high]) {
  const at = Math.min(Math.max((value - low) / (high - low || 1), 0), 1) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[i].map((from, c) => from + (at - i) * (VIRIDIS[i + 1][c] - from));
}

// The field of all tokens, drawn where `places` has them.
function paint(canvas, field, places, range, seeThrough) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!field) return;
  const data = context.createImageData(canvas.width, canvas.height);
  places.forEach((place, n) => {
    if (place < 0) return;
    data.data.set([...colour(field[place], range), seeThrough ? 165 : 255], 4 * n);
  });
  context.putImageData(data, 0, 0);
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.style.colorScheme ? root.style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = dark ? "light" : "dark";
});
showList();
