"use strict";
// Draws the figures in the colours that the reader prefers, and for print in light ones.
const figures = JSON.parse(document.getElementById("figures").textContent);
const timeline = document.getElementById("timeline");
const dark = matchMedia("(prefers-color-scheme: dark)");

// Nothing leaves the page: no button sends a figure to a server.
const options = {
  responsive: true, displaylogo: false, scrollZoom: true, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d"],
};

function template(isDark) {
  const ink = isDark ? "#e6e8ea" : "#1c2024", paper = isDark ? "#14171a" : "#ffffff", line = isDark ? "#363c42" : "#d5d9de";
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line };
  return { layout: {
    paper_bgcolor: paper, plot_bgcolor: paper, font: { color: ink, family: "system-ui, sans-serif" },
    xaxis: axis, yaxis: axis, hoverlabel: { bgcolor: paper, bordercolor: line, font: { color: ink } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink }, margin: { l: 110, r: 20, t: 40, b: 50 },
    legend: { orientation: "h", y: -0.08, itemsizing: "constant" },
  } };
}

// The axes of gfns leave out what is empty: names for some of what is in [low, high].
function gfnTicks(parts, low, high) {
  const step = 2 ** Math.max(0, Math.ceil(Math.log2((high - low) / 8)));
  const tickvals = [], ticktext = [];
  for (const [place, start, count] of parts) {
    const first = Math.max(start, start + low - place), end = Math.min(start + count, start + high - place);
    for (let gfn = first > start ? Math.ceil(first / step) * step : start; gfn < end; gfn = (Math.floor(gfn / step) + 1) * step) {
      const at = gfn - start + place;
      if (tickvals.length && at - tickvals.at(-1) < step / 2) continue;
      tickvals.push(at);
      ticktext.push("0x" + gfn.toString(16));
    }
  }
  return { "yaxis.tickvals": tickvals, "yaxis.ticktext": ticktext, "yaxis2.tickvals": tickvals, "yaxis2.ticktext": ticktext };
}

function nameGfns() {
  const { meta, yaxis } = timeline.layout;
  return Plotly.relayout(timeline, gfnTicks(meta.parts, ...yaxis.range));
}

function paint(isDark) {
  for (const name of Object.keys(figures)) Plotly.relayout(name, { template: template(isDark) });
}

async function draw() {
  for (const [name, figure] of Object.entries(figures)) {
    figure.layout.template = template(dark.matches);
    await Plotly.newPlot(name, figure.data, figure.layout, options);
  }
  timeline.on("plotly_relayout", (changed) => {
    if (Object.keys(changed).some((name) => /^yaxis2?\.(range|autorange)/.test(name))) nameGfns();
  });
  await nameGfns();
  dark.addEventListener("change", () => paint(dark.matches));
  addEventListener("beforeprint", () => paint(false));
  addEventListener("afterprint", () => paint(dark.matches));
  document.body.dataset.drawn = "yes";
}

draw();
