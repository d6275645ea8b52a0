"use strict";
// Sorting, filtering and details on demand. The data is in the page; nothing is loaded.
(() => {
const data = JSON.parse(document.getElementById("report-data").textContent);
const {html, number, digits, decibels, percent} = charts;
const {tensorPicture, historyPicture, spread, figure} = charts;

// The run

function timeline(holder) {
  const columns = {};
  for (const layer of data.layers) for (const t of layer.tensors) columns[t.name] = t.column;
  const few = "each tensor, and their median", many = "median, middle half and range of tensors";
  for (const [key, what] of [["snr_db", "SNR"], ["output_snr_db", "SNR of outputs by"]]) {
    const history = data.histories[key];
    if (!history) continue;
    for (const column of ["weight", "input", "output"]) {
      const names = Object.keys(history.values).filter((name) => columns[name] === column);
      if (!names.length) continue;
      const lines = spread(history, names), note = names.length <= 60 ? few : many;
      const middle = lines[lines.length - 1].values.filter(number);
      const text = key === "snr_db" ? `SNR of ${column}s` : "SNR at outputs, weights rounded";
      const title = `${what} ${column}s in dB: median from ${digits(middle[0])} to ` +
        digits(middle[middle.length - 1]);
      figure(holder, text, note, historyPicture(title, "dB", history.steps, lines));
    }
  }
  const scales = data.histories.scale;
  if (!scales) return;
  const names = Object.keys(scales.values);
  const last = (row) => row.filter(number).pop();
  const octaves = (x, row) => (number(x) ? Math.log2(x / last(row)) : null);
  const note = `octaves from where they end; ${names.length <= 60 ? few : many}`;
  figure(holder, "Scales", note, historyPicture(
    "Scales over the run, in octaves from where they end", "oct.", scales.steps,
    spread(scales, names, octaves)));
  figure(holder, "Refreshes", `of ${names.length} scales, those that moved since the bar before`,
    historyPicture("Number of scales that moved, over the run", "", scales.steps,
      [{values: scales.moved, bars: true}]));
}

// Details of a layer

function facts(tensor) {
  const scales = tensor.scales || [], known = [];
  const say = (name, value) => known.push(html("dt", {}, name), html("dd", {}, value));
  if ("snr_db" in tensor) say("SNR", decibels(tensor.snr_db));
  if ("output_snr_db" in tensor) say("SNR at the output", decibels(tensor.output_snr_db));
  say("format", tensor.bits ? `${tensor.format}, ${tensor.bits} bits` : tensor.format);
  if (tensor.granularity) say("granularity", tensor.granularity);
  if (tensor.quantizer) say("quantizer", tensor.quantizer);
  if (tensor.values) say("values", tensor.values.toLocaleString("en"));
  if (scales.length && tensor.num_scales > 1) {
    say("scales", `${tensor.num_scales}: ${digits(scales[0])} to ${digits(scales[2])}, mean ` +
      digits(scales[1]));
  } else if (scales.length) say("scale", digits(scales[1]));
  if ("clipped" in tensor) say("clipped", percent(tensor.clipped));
  if ("grid_used" in tensor) say("levels used", percent(tensor.grid_used));
  if ("refreshes" in tensor) say("refreshes", String(tensor.refreshes));
  return html("dl", {class: "facts"}, ...known);
}

function alternatives(tensor) {
  const head = html("tr", {}, ...["change", "to", "bits", "SNR", "gain"].map((text) =>
    html("th", {scope: "col"}, text)));
  const rows = tensor.alternatives.map((each, k) => {
    const to = each.format === tensor.format ? each.granularity : each.format;
    const sign = each.gain_db > 0 ? "+" : "";
    const gain = number(each.gain_db) ? sign + decibels(each.gain_db) : "exact";
    const out = each.keeps_kernels ? "" : " \u2020";
    const mark = k === tensor.helpful ? " \u25c6" : each.gain_db === "inf" ? "" : out;
    return html("tr", k === tensor.helpful ? {class: "first"} : {},
      html("th", {scope: "row"}, each.change + mark),
      ...[to, `${each.extra_bits > 0 ? "+" : ""}${digits(each.extra_bits)}`,
        decibels(each.snr_db), gain].map((text) => html("td", {}, text)));
  });
  const said = [];
  if ("helpful" in tensor) said.push("\u25c6 gains most for each bit");
  if (tensor.alternatives.some((each) => !each.keeps_kernels && each.gain_db !== "inf")) {
    said.push("\u2020 leaves integer arithmetic");
  }
  return html("div", {}, html("table", {}, html("thead", {}, head), html("tbody", {}, ...rows)),
    html("small", {}, said.join("; ")));
}

function tensorDetail(layer, tensor) {
  const pictures = html("div"), aside = html("div", {}, facts(tensor));
  if (tensor.chart) {
    pictures.append(html("h4", {}, "Spectrum, ranges of formats and their error"),
      tensorPicture(tensor));
  } else {
    pictures.append(html("p", {class: "note"}, "There is no energy spectrum of this tensor: its " +
      "quantizer keeps none, or the file holds codes alone."));
  }
  const kinds = [["snr_db", "SNR over the run", "dB"],
    ["output_snr_db", "SNR at the output over the run", "dB"], ["scale", "Scale over the run", ""]];
  for (const [key, title, unit] of kinds) {
    const history = data.histories[key], values = history && history.values[tensor.name];
    if (!values || !values.some(number)) continue;
    const ends = values.filter(number);
    pictures.append(html("h4", {}, title), historyPicture(`${tensor.name}, ${title}: from ` +
      `${digits(ends[0])} to ${digits(ends[ends.length - 1])} ${unit}`, unit, history.steps,
      [{values}]));
  }
  if (tensor.alternatives) {
    aside.append(html("h4", {}, "Predicted, with scales of least error"), alternatives(tensor));
  }
  return html("div", {class: "tensor"}, html("h3", {}, `${layer.name || "(model)"} `,
    html("small", {}, tensor.role)), html("div", {class: "columns"}, pictures, aside));
}

// The error of a layer's output against the float network, where it was compared.
function outputErrors(layer) {
  const kinds = [["made_db", "made here", ""], ["inherited_db", "inherited", "7 3"],
    ["total_db", "in all", "2 3"]];
  const known = kinds.filter(([key]) => (data.histories[key] || {values: {}}).values[layer.name]);
  if (!known.length) return [];
  const lines = known.map(([key, , dash], k) => ({dash, color: `var(--c${k + 1})`,
    values: data.histories[key].values[layer.name]}));
  const named = known.map(([, name], k) => `${["solid", "dashed", "dotted"][k]}: ${name}`);
  const title = `${layer.name}: SNR of the output against the float network`;
  return [html("h4", {}, `SNR of the output against the float network (${named.join(", ")})`),
    historyPicture(title, "dB", data.histories[known[0][0]].steps, lines)];
}

function toggle(button, row, layer, columns) {
  const opened = row.nextElementSibling;
  if (opened && opened.classList.contains("detail")) {
    opened.remove();
    button.setAttribute("aria-expanded", "false");
    return;
  }
  const cell = html("td", {colspan: columns, role: "cell"});
  if (layer.remark) cell.append(html("p", {class: "note"}, layer.remark));
  cell.append(...outputErrors(layer));
  cell.append(...layer.tensors.map((tensor) => tensorDetail(layer, tensor)));
  const id = button.getAttribute("aria-controls");
  row.after(html("tr", {class: "detail", role: "row", id}, cell));
  button.setAttribute("aria-expanded", "true");
}

// The table

const openers = new Map();

// Links to a layer, `#layer=name`, show its details.
function openLinked() {
  const found = /^#layer=(.*)$/.exec(location.hash);
  const open = found && openers.get(decodeURIComponent(found[1]));
  if (open) open();
}

// Narrow screens lay tables out as blocks, which takes their roles away in some browsers.
function keepRoles(table) {
  const roles = {TABLE: "table", THEAD: "rowgroup", TBODY: "rowgroup", TR: "row", TD: "cell"};
  for (const element of [table, ...table.querySelectorAll("thead, tbody, tr, td, th")]) {
    const head = element.scope === "row" ? "rowheader" : "columnheader";
    element.setAttribute("role", roles[element.tagName] || head);
  }
}

function layerTable(table) {
  const body = table.tBodies[0], rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  for (const row of rows) {
    const layer = data.layers[row.dataset.i], name = row.querySelector(".name");
    if (!layer.tensors.length) continue;
    const button = html("button", {class: "name-button", type: "button", "aria-expanded": "false",
      "aria-controls": `detail-${row.dataset.i}`}, ...name.childNodes);
    button.addEventListener("click", () => toggle(button, row, layer, heads.length));
    openers.set(layer.name, () => {
      row.hidden = false;
      if (button.getAttribute("aria-expanded") === "false") button.click();
      button.focus({preventScroll: true});
      row.scrollIntoView();
    });
    name.replaceChildren(button);
  }
  const value = (row, key) => {
    if (key === "order") return Number(row.dataset.i);
    const cell = row.querySelector(`td.${key}`);
    if (!cell) return Infinity;
    if (!cell.dataset.v) return key === "type" ? cell.textContent : Infinity;
    return Number.isNaN(Number(cell.dataset.v)) ? cell.dataset.v : Number(cell.dataset.v);
  };
  const compare = (a, b) => (number(a) && number(b) ? a - b : String(a).localeCompare(String(b)));
  const place = (order) => {
    for (const row of order) {
      const detail = row.nextElementSibling;
      body.append(row);
      if (detail && detail.classList.contains("detail")) body.append(detail);
    }
  };
  const downFirst = (key) => ["parameters", "help"].includes(key);
  for (const head of heads) {
    const key = head.dataset.key, button = html("button", {type: "button"}, head.textContent);
    head.replaceChildren(button);
    head.setAttribute("aria-sort", key === "order" ? "ascending" : "none");
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const down = now === "none" ? downFirst(key) : now === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const known = rows.filter((row) => value(row, key) !== Infinity);
      const missing = rows.filter((row) => value(row, key) === Infinity);
      known.sort((a, b) => compare(value(a, key), value(b, key)));
      place([...(down ? known.reverse() : known), ...missing]);
    });
  }
  tools(rows);
}

function tools(rows) {
  const find = html("input", {type: "search", placeholder: "name, type or format"});
  const show = html("select");
  for (const [key, text] of [["quantized", "quantized layers"], ["float", "layers in float"],
    ["all", "all layers"]]) {
    if (key === "all" || rows.some((row) => row.dataset.state === key)) {
      show.append(html("option", {value: key}, text));
    }
  }
  const said = html("output", {"aria-live": "polite"});
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let seen = 0;
    rows.forEach((row, i) => {
      const kept = (show.value === "all" || row.dataset.state === show.value) &&
        words.every((word) => texts[i].includes(word));
      row.hidden = !kept;
      const detail = row.nextElementSibling;
      if (detail && detail.classList.contains("detail")) detail.hidden = !kept;
      seen += kept;
    });
    said.textContent = `${seen} of ${rows.length} layers`;
  };
  find.addEventListener("input", filter);
  show.addEventListener("change", filter);
  document.getElementById("layer-tools").append(html("label", {}, "Filter", find),
    html("label", {}, "Show", show), said);
  filter();
}

document.querySelectorAll("table.worst, table.layers").forEach(keepRoles);
layerTable(document.getElementById("layer-table"));
const holder = document.getElementById("timeline-charts");
if (holder) timeline(holder);
addEventListener("hashchange", openLinked);
openLinked();
})();
