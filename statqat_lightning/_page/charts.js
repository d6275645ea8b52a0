"use strict";
// Pictures of the report as inline SVG, drawn in the pixels that they have.
const charts = (() => {
const COLORS = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "1 2"];

// Elements

function html(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const number = (x) => typeof x === "number";
const digits = (x) => (number(x) ? String(Number(x.toPrecision(3))) : x || "not known");
const signed = (x, places) => x.toFixed(places).replace("-", "\u2212");
const decibels = (x) => (x === "inf" ? "exact" : number(x) ? `${signed(x, 1)} dB` : "not known");
const percent = (x) => (x > 0 && x < 1e-4 ? "< 0.01 %" : `${digits(100 * x)} %`);

// A picture is drawn in the pixels that it has, and again when these change.
function picture(height, title, draw) {
  const holder = html("div", {class: "picture"});
  let width = 0;
  const redraw = () => {
    const now = Math.round(holder.clientWidth);
    if (!now || now === width) return;
    width = now;
    const root = svg("svg", {viewBox: `0 0 ${now} ${height}`, height, role: "img"});
    root.append(svg("title", {}, title));
    draw(root, now);
    holder.replaceChildren(root);
  };
  setTimeout(redraw);
  // In a frame of its own: what is drawn may change the size that is observed.
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(holder);
  return holder;
}

function label(x, y, text, anchor = "start", style = "") {
  return svg("text", {x, y, "text-anchor": anchor, class: style}, text);
}

function line(x1, y1, x2, y2, style) {
  return svg("line", {x1, y1, x2, y2, class: style});
}

function path(points, attributes) {
  let text = "", pen = "M";
  for (const [x, y] of points) {
    if (y === null || Number.isNaN(y)) { pen = "M"; continue; }
    text += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  }
  return svg("path", {d: text, fill: "none", ...attributes});
}

function ticks(low, high, most) {
  const span = Math.max(high - low, 1e-9);
  const raw = span / most, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * unit).find((k) => k >= raw);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + 1e-9; k++) found.push(k * step);
  return found;
}

// One tensor: spectrum, ranges of formats and error curves over one axis of magnitudes

function power(x, y, exponent) {
  const raised = svg("tspan", {dy: -4, "font-size": 9}, String(exponent).replace("-", "\u2212"));
  return svg("text", {x, y, "text-anchor": "middle"}, "2", raised);
}

function tensorPicture(tensor) {
  const chart = tensor.chart, formats = chart.formats;
  const top = 16, spectrum = 96, row = 20, ranges = row * formats.length + 12, curves = 140;
  const below = top + spectrum + ranges, height = below + curves + 40;
  const title = `${tensor.name}: energy spectrum, ranges of ${formats.map((f) =>
    `${f.format} (${decibels(f.snr_db)})`).join(", ")}, and SNR over the clip point; in force ` +
    `${decibels(chart.snr_db)}`;
  const steps = formats[0].curve.length;
  const lowClip = chart.highest_clip - (steps - 1) / 4;
  const end = chart.lowest + chart.energy.length / 4;
  const high = Math.max(end, chart.highest_clip, chart.clip) + 0.25;
  const low = Math.max(Math.min(chart.lowest, lowClip), high - 24);
  return picture(height, title, (root, width) => {
    const left = 96, right = width - 14;
    const at = (u) => left + (Math.min(Math.max(u, low), high) - low) / (high - low) *
      (right - left);
    const every = [1, 2, 4, 8].find((k) => (high - low) / k <= (right - left) / 34) || 8;
    for (let u = Math.ceil(low / every) * every; u <= high; u += every) {
      root.append(line(at(u), top, at(u), height - 34, "axis"), power(at(u), height - 18, u));
    }
    const unit = chart.unit === "scale" ? "magnitude over its scale" : "magnitude";
    root.append(label((left + right) / 2, height - 3, `${unit}; clip point`, "middle"));

    const most = Math.max(...chart.energy), floor = top + spectrum;
    const outline = (energy) => energy.flatMap((share, k) => {
      const y = floor - share / most * (spectrum - 6);
      return [[at(chart.lowest + k / 4), y], [at(chart.lowest + (k + 1) / 4), y]];
    });
    const area = (energy, attributes) => {
      const points = outline(energy).map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`);
      const start = at(chart.lowest).toFixed(1);
      root.append(svg("path", {
        d: `M${start} ${floor}L${points.join("L")}V${floor}Z`, ...attributes}));
    };
    area(chart.energy, {class: "area"});
    root.append(path(outline(chart.energy), {class: "edge"}));
    if (chart.negative.length) {
      root.append(path(outline(chart.negative), {class: "edge", "stroke-dasharray": "3 2"}));
      root.append(label(left - 6, top + 40, "dashed:", "end"));
      root.append(label(left - 6, top + 53, "below zero", "end"));
    }
    root.append(line(left, floor, right, floor, "axis"));
    root.append(label(left - 6, top + 8, `${digits(most)} %`, "end"));
    root.append(label(left - 6, top + 21, "per \u00bc octave", "end"));

    formats.forEach((format, k) => {
      const y = floor + 8 + k * row, color = COLORS[k % 6];
      const bar = (from, to, opacity) => svg("rect", {x: at(from), y: y + 1, height: 11,
        width: Math.max(at(to) - at(from), 0), style: `fill:${color};opacity:${opacity}`});
      root.append(bar(format.zero, format.normal, 0.3), bar(format.normal, format.clip, 0.85));
      root.append(label(left - 6, y + 11, format.format, "end", k ? "" : "strong"));
      const text = decibels(format.snr_db), x = at(format.clip) + 5;
      const inside = x + 44 > right;
      root.append(label(inside ? x - 9 : x, y + (inside ? 10.5 : 11), text,
        inside ? "end" : "start", inside ? "on-bar" : "strong"));
    });

    const known = formats.flatMap((f) => f.curve).filter(number);
    const best = Math.max(...known, chart.snr_db, 1) * 1.05, base = below + curves;
    const up = (db) => base - Math.max(db, 0) / best * (curves - 12);
    for (const db of ticks(0, best, 4)) {
      root.append(line(left, up(db), right, up(db), "axis"));
      root.append(label(left - 6, up(db) + 4, `${db} dB`, "end"));
    }
    formats.forEach((format, k) => {
      const points = format.curve.map((db, i) =>
        [at(chart.highest_clip - i / 4), number(db) ? up(db) : null]);
      root.append(path(points, {"stroke-width": k ? 1.4 : 2.4, "stroke-dasharray": DASHES[k % 6],
        style: `stroke:${COLORS[k % 6]}`}));
      const y = floor + 14 + k * row;
      root.append(svg("line", {x1: 2, x2: 16, y1: y, y2: y, "stroke-width": k ? 1.4 : 2.4,
        "stroke-dasharray": DASHES[k % 6], style: `stroke:${COLORS[k % 6]}`}));
    });
    const x = at(chart.clip), side = x > (left + right) / 2 ? "end" : "start";
    root.append(line(x, top - 2, x, base, "mark"));
    root.append(svg("circle", {cx: x, cy: up(chart.snr_db), r: 4, style: "fill:var(--mark)"}));
    root.append(label(x, top - 5, `scale in force: ${decibels(chart.snr_db)}`, side, "mark-text"));
  });
}

// Histories

function historyPicture(title, unit, steps, lines, height = 130) {
  return picture(height, title, (root, width) => {
    const left = 48, right = width - 10, top = 10, base = height - 30;
    const values = lines.flatMap((each) => each.values || [...each.low, ...each.high])
      .filter(number);
    let low = Math.min(...values), high = Math.max(...values);
    if (!values.length) return;
    if (unit === "dB" && high - low < 1) {
      [low, high] = [(low + high) / 2 - 0.5, (low + high) / 2 + 0.5];
    }
    const room = high - low < 1e-9 ? Math.max(Math.abs(high) / 10, 1e-9) : (high - low) / 16;
    [low, high] = [low - room, high + room];
    const first = steps[0], last = steps[steps.length - 1];
    const across = (step) => left + (step - first) / Math.max(last - first, 1) * (right - left);
    const up = (y) => base - (y - low) / (high - low) * (base - top);
    for (const y of ticks(low, high, 4)) {
      root.append(line(left, up(y), right, up(y), "axis"));
      root.append(label(left - 5, up(y) + 4, digits(y), "end"));
    }
    for (const step of ticks(first, last, Math.max(2, Math.floor(width / 90)))) {
      if (Number.isInteger(step)) root.append(label(across(step), base + 14, step, "middle"));
    }
    root.append(label(right, height - 2, "training step", "end"), label(0, top + 2, unit));
    for (const each of lines) {
      if (each.bars) {
        const wide = Math.max((right - left) / steps.length - 1, 1);
        each.values.forEach((y, i) => root.append(svg("rect", {x: across(steps[i]) - wide / 2,
          y: up(y), width: wide, height: Math.max(up(0) - up(y), 0), class: "solid"})));
      } else if (each.values) {
        const points = each.values.map((y, i) => [across(steps[i]), number(y) ? up(y) : null]);
        root.append(path(points, {"stroke-width": each.width || 1.8,
          "stroke-dasharray": each.dash || "",
          style: `stroke:${each.color || "var(--accent)"}`}));
        if (points.length === 1 && points[0][1] !== null) {
          root.append(svg("circle", {cx: points[0][0], cy: points[0][1], r: 3,
            style: "fill:var(--accent)"}));
        }
      } else {
        const kept = steps.map((step, i) => [across(step), each.low[i], each.high[i]])
          .filter(([, a, b]) => number(a) && number(b));
        const there = kept.map(([x, , b]) => `${x.toFixed(1)} ${up(b).toFixed(1)}`);
        const back = kept.reverse().map(([x, a]) => `${x.toFixed(1)} ${up(a).toFixed(1)}`);
        if (kept.length) {
          root.append(svg("path", {d: `M${[...there, ...back].join("L")}Z`, class: each.style}));
        }
      }
    }
  });
}

function quantile(sorted, share) {
  const place = share * (sorted.length - 1), k = Math.floor(place);
  const next = sorted[Math.min(k + 1, sorted.length - 1)];
  return sorted[k] + (place - k) * (next - sorted[k]);
}

// Every tensor as a thin line, or their quantiles where they are too many to be told apart.
function spread(history, names, change = (x) => x) {
  const columns = history.steps.map((_, i) => names.map((name) => history.values[name])
    .map((row) => change(row[i], row)).filter(number).sort((a, b) => a - b));
  const at = (share) => columns.map((row) => (row.length ? quantile(row, share) : null));
  const median = {values: at(.5), width: 2.6};
  if (names.length <= 60) {
    const thin = {width: 0.8, color: "var(--fill)"};
    return [...names.map((name) => ({...thin, values: history.values[name].map((x, i, row) =>
      change(x, row))})), median];
  }
  return [{low: at(0), high: at(1), style: "band"}, {low: at(.25), high: at(.75), style: "inner"},
    median];
}

function figure(holder, title, note, content) {
  holder.append(html("figure", {style: "margin:0"}, html("figcaption", {}, html("b", {}, title),
    html("br"), html("small", {}, note)), content));
}

return {
  html, number, digits, decibels, percent, tensorPicture, historyPicture, spread, figure,
};
})();
