"use strict";
/* Draws the figures of a report. They come as Plotly's own JSON, but for
   - colours: `var(--name)` is a property of the style sheet and `ramp(t)` a place between the two ends of its ramp, so
     both follow the theme;
   - `axes`: for each quantity the x of each trace; a switch chooses;
   - `views`: ranges of the x axis; a switch chooses. Of such a figure only the bars in or near the view are drawn. */

const figures = JSON.parse(document.getElementById("figures").textContent);
const config = {
  displaylogo: false,
  showSendToCloud: false, // Plotly's own server; what is on this page stays on this machine
  plotlyServerURL: "",
  responsive: true,
  doubleClick: "reset",
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
};

function property(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function mix(from, to, t) {
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const [a, b] = [channels(from), channels(to)];
  return `rgb(${a.map((value, k) => Math.round(value + t * (b[k] - value))).join(",")})`;
}

function colored(value) {
  if (typeof value === "string") {
    const [, kind, argument] = /^(var|ramp)\((.+)\)$/.exec(value) || [];
    if (kind === "var") return property(argument);
    return kind === "ramp" ? mix(property("--ramp-from"), property("--ramp-to"), Number(argument)) : value;
  }
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(colored);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, colored(inner)]));
}

function axis(own) {
  const line = property("--line"), grid = property("--grid");
  return { gridcolor: grid, linecolor: line, zerolinecolor: line, automargin: true, ...own,
    title: { standoff: 12, ...own.title, font: { size: 12.5 } } };
}

function laidOut(layout) {
  const own = colored(layout), surface = property("--surface");
  const full = {
    height: 380,
    margin: { l: 60, r: 20, t: 40, b: 50 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: property("--soft") },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", xanchor: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: property("--quiet"), activecolor: property("--ink") },
    hoverlabel: { bgcolor: surface, bordercolor: property("--line"), font: { color: property("--ink") }, align: "left" },
    ...own,
  };
  for (const key of Object.keys(full)) if (/^[xy]axis/.test(key)) full[key] = axis(full[key]);
  return full;
}

const units = {
  rounds: { "xaxis.title.text": "round", "xaxis.tickformat": "", "xaxis.ticksuffix": "" },
  seconds: { "xaxis.title.text": "seconds", "xaxis.tickformat": "", "xaxis.ticksuffix": "" },
  bytes: { "xaxis.title.text": "bytes, up and down, all clients", "xaxis.tickformat": "~s", "xaxis.ticksuffix": "B" },
};

function addSwitch(box, plot, choices) {
  const bar = document.createElement("div");
  bar.className = "switch";
  for (const [number, [name, choose]] of choices.entries()) {
    const button = document.createElement("button");
    button.textContent = name;
    button.setAttribute("aria-pressed", String(number === 0));
    button.addEventListener("click", () => {
      for (const other of bar.children) other.setAttribute("aria-pressed", String(other === button));
      choose();
    });
    bar.append(button);
  }
  box.insertBefore(bar, plot);
}

function choicesOf(figure, plot) {
  const axes = Object.entries(figure.axes || {}).map(([name, x]) => [
    name, () => Plotly.update(plot, { x }, { ...units[name], "xaxis.autorange": true }),
  ]);
  const views = Object.entries(figure.views || {}).map(([name, range]) => [
    name, () => Plotly.relayout(plot, { "xaxis.range": [...range] }),
  ]);
  return [...axes, ...views];
}

const columns = ["base", "x", "y", "width", "customdata"];

function nearView(traces, [from, to]) {
  const margin = (to - from) / 2;
  return traces.map((trace) => {
    const near = [];
    trace.base.forEach((start, k) => {
      if (start < to + margin && start + trace.x[k] > from - margin) near.push(k);
    });
    return Object.fromEntries(columns.map((column) => [column, near.map((k) => trace[column][k])]));
  });
}

function followView(figure, plot) {
  plot.on("plotly_relayout", (changes) => {
    if (!Object.keys(changes).some((key) => key.startsWith("xaxis"))) return;
    const bars = nearView(figure.data, plot.layout.xaxis.range);
    const update = Object.fromEntries(columns.map((column) => [column, bars.map((trace) => trace[column])]));
    Plotly.restyle(plot, update);
  });
}

async function drawFigure(name, figure) {
  const box = document.getElementById(name), plot = document.createElement("div");
  box.replaceChildren(plot);
  const choices = choicesOf(figure, plot);
  if (choices.length > 1) addSwitch(box, plot, choices);
  let data = colored(figure.data);
  if (figure.views) {
    const bars = nearView(figure.data, figure.layout.xaxis.range);
    data = data.map((trace, number) => ({ ...trace, ...bars[number] }));
  }
  await Plotly.newPlot(plot, data, laidOut(figure.layout), config);
  if (figure.views) followView(figure, plot);
}

async function draw() {
  for (const [name, figure] of Object.entries(figures)) {
    await drawFigure(name, figure);
    await new Promise((resolve) => setTimeout(resolve)); // what is drawn already can be used
  }
  performance.mark("drawn");
  document.documentElement.dataset.drawn = "yes";
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
